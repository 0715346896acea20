"""The page of a comparison: a table that sorts, and charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from torchchat_core.amounts import size_text
from torchchat_core.measure.chart import FRONT_SENTENCE, Axis, Box, Panel, Point, panels, place_labels
from torchchat_core.measure.comparing import Comparison
from torchchat_core.measure.document import document, listed, paragraphs, sortable_table
from torchchat_core.measure.summary import (
    COLUMNS,
    cells,
    left_alone_lines,
    method_lines,
    noise_lines,
    refused_lines,
)

WIDTH, HEIGHT = 620, 400  # of a chart, in its own pixels
FRAME = Box(64, 34, 540, 316)  # of a chart's axes
LETTER, LINE = 6.3, 13.0  # of a label's 11 px: the width of a wide letter, and the height


def html_page(comparison: Comparison) -> str:
    """The whole page of a comparison."""
    charts = "\n".join(f"<figure>{_chart(panel)}</figure>" for panel in panels(comparison))
    rows = [(cells(row, comparison), row in comparison.front) for row in comparison.rows]
    return document(f"Quantising {comparison.model}", f"""{paragraphs((*method_lines(comparison),
                                                                      *noise_lines(comparison)))}
<div class="charts">
{charts}
</div>
<p>Filled circles and shaded rows are {escape(FRONT_SENTENCE)}. The area of a circle grows with the decoding speed. A
line is the front of the two quantities of its chart.</p>
{sortable_table(COLUMNS, rows)}
{listed("Not measured", refused_lines(comparison))}
{listed("Layers that were left alone", left_alone_lines(comparison))}""")


# ---- one chart ----------------------------------------------------------------------------------------------------


def _chart(panel: Panel) -> str:
    across = Axis.around([point.x for point in panel.points])
    up = Axis.around([point.y for point in panel.points], panel.logarithmic)
    parts = [*_axes(across, up, panel), *_front(panel, across, up), *_points(panel, across, up)]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)} over bytes">\n' \
           + "\n".join(parts) + "\n</svg>"


def _x(axis: Axis, value: float) -> float:
    return FRAME.left + FRAME.width * axis.share(value)


def _y(axis: Axis, value: float) -> float:
    return FRAME.top + FRAME.height * (1 - axis.share(value))


def _axes(across: Axis, up: Axis, panel: Panel) -> Iterator[str]:
    bottom, right = FRAME.top + FRAME.height, FRAME.left + FRAME.width
    yield f'<text x="{FRAME.left}" y="18" font-weight="600">{escape(panel.title)}</text>'
    for value in across.ticks:
        x = _x(across, value)
        yield f'<line class="grid" x1="{x:.1f}" y1="{FRAME.top}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{size_text(round(value))}</text>'
    for value in up.ticks:
        y = _y(up, value)
        yield f'<line class="grid" x1="{FRAME.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{FRAME.left - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    yield f'<text class="tick" x="{right}" y="{bottom + 36}" text-anchor="end">bytes of the weights</text>'
    if panel.at_zero:
        note = escape(f"at 0: {', '.join(panel.at_zero)}")
        yield f'<text class="note" x="{FRAME.left}" y="{bottom + 36}">{note}</text>'


def _front(panel: Panel, across: Axis, up: Axis) -> Iterator[str]:
    corners: list[str] = []
    for point in panel.staircase:
        x, y = _x(across, point.x), _y(up, point.y)
        corners.append(f"H{x:.1f}V{y:.1f}" if corners else f"M{x:.1f} {y:.1f}")
    if len(corners) > 1:
        yield f'<path class="front" d="{"".join(corners)}"/>'


def _points(panel: Panel, across: Axis, up: Axis) -> Iterator[str]:
    circles = [(_x(across, point.x), _y(up, point.y), _radius(point)) for point in panel.points]
    places = place_labels(circles, [LETTER * len(point.label) for point in panel.points], LINE, FRAME)
    for (x, y, radius), box in zip(circles, places, strict=True):
        near = min(max(x, box.left), box.left + box.width), min(max(y, box.top), box.top + LINE)
        if (near[0] - x) ** 2 + (near[1] - y) ** 2 > (radius + 10) ** 2:
            yield f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>'
    for point, (x, y, radius), box in zip(panel.points, circles, places, strict=True):
        kind = ' class="best"' if point.on_front else ""
        yield f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(point.name)}</title></circle>'
        leftwards = box.left + box.width / 2 < x  # the estimate of the width is a wide one
        anchor, edge = ("end", box.left + box.width) if leftwards else ("start", box.left)
        yield f'<text class="label" x="{edge:.1f}" y="{box.top + LINE - 3:.1f}" text-anchor="{anchor}">' \
              f"{escape(point.label)}</text>"


def _radius(point: Point) -> float:
    return 3.5 + 7 * math.sqrt(point.size)
