"""The rows of `torchchat bench` as bars: a page, or a PNG drawn by matplotlib (`torchchat-core[plot]`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torchchat_core.measure.benchmark import Failed, Row
from torchchat_core.measure.benchmark_report import COLUMNS, cells, failed_lines, method_line
from torchchat_core.measure.chart import Axis
from torchchat_core.measure.comparing import shortened
from torchchat_core.measure.document import document, listed, paragraphs, sortable_table
from torchchat_core.measure.png import DOTS, FONT, FRONT, INK, require_matplotlib
from torchchat_core.measure.rates import Rate

WIDTH, LEFT, BAR, GAP, TOP = 620, 250, 16, 8, 34  # of a chart, in its own pixels
LABEL_LENGTH = 40  # characters


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One rate of every row."""

    title: str
    rates: tuple[tuple[str, Rate], ...]  # label, value

    @property
    def axis(self) -> Axis:
        """From zero to beyond the highest of the runs."""
        return Axis(low=0.0, high=1.05 * max(rate.highest for _, rate in self.rates))


def charts(rows: Sequence[Row]) -> tuple[Bars, Bars]:
    """Decoding and prefill, tokens per second."""
    labels = [shortened(", ".join([row.executor, row.dtype, *([row.label] if row.label else [])]), LABEL_LENGTH)
              for row in rows]
    return (Bars(title="Decoding, tokens/s", rates=tuple(zip(labels, (row.rates.decode for row in rows), strict=True))),
            Bars(title="Prefill, tokens/s", rates=tuple(zip(labels, (row.rates.prefill for row in rows), strict=True))))


def html_page(model: str, rows: Sequence[Row], failed: Sequence[Failed]) -> str:
    """The whole page."""
    figures = "\n".join(f"<figure>{_svg(bars)}</figure>" for bars in charts(rows))
    fastest = max(rows, key=lambda row: row.rates.decode.median)
    return document(f"Speed of {model}", f"""{paragraphs([method_line(rows[0])])}
<div class="charts">
{figures}
</div>
<p>A bar ends at the median; the thin line is the range of the runs. The shaded row decodes fastest.</p>
{sortable_table(COLUMNS, [(cells(row), row is fastest) for row in rows])}
{listed("Not measured", failed_lines(failed))}""")


def _svg(bars: Bars) -> str:
    axis, room = bars.axis, WIDTH - LEFT - 20
    bottom = TOP + len(bars.rates) * (BAR + GAP)
    parts = [f'<text x="0" y="18" font-weight="600">{escape(bars.title)}</text>']
    for value in axis.ticks:
        x = LEFT + room * axis.share(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{value:g}</text>')
    for index, (label, rate) in enumerate(bars.rates):
        y, middle = TOP + index * (BAR + GAP), TOP + index * (BAR + GAP) + BAR / 2
        low, median, high = (LEFT + room * axis.share(each) for each in (rate.lowest, rate.median, rate.highest))
        parts.append(f'<text x="{LEFT - 6}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="bar" x="{LEFT}" y="{y}" width="{median - LEFT:.1f}" height="{BAR}"/>')
        parts.append(f'<line class="range" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 24}" role="img" aria-label="{escape(bars.title)}">\n' \
           + "\n".join(parts) + "\n</svg>"


def draw_png(model: str, rows: Sequence[Row]) -> bytes:
    """The picture as a PNG file. Raises `TorchchatError` where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.8 + 0.34 * len(rows)), dpi=DOTS, facecolor="white", layout="constrained")
    figure.suptitle(f"{model}: {method_line(rows[0])}", fontsize=FONT, color=INK, x=0.01, ha="left", parse_math=False)
    places = figure.subplots(1, 2)
    for axes, bars in zip(places, charts(rows), strict=True):
        medians = [rate.median for _, rate in bars.rates]
        ranges = [[rate.median - rate.lowest for _, rate in bars.rates],
                  [rate.highest - rate.median for _, rate in bars.rates]]
        axes.barh(range(len(medians)), medians, xerr=ranges, color=FRONT, alpha=0.75, ecolor=INK)
        axes.set_yticks(range(len(medians)), [label for label, _ in bars.rates], fontsize=FONT, color=INK,
                        parse_math=False)
        axes.invert_yaxis()
        axes.set_title(bars.title, fontsize=FONT + 1, color=INK, loc="left")
        axes.tick_params(labelsize=FONT, colors=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    content = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(content)
    return content.getvalue()
