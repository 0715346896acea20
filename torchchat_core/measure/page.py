"""The page of a comparison: one HTML file without requests to anywhere, a table that sorts and charts as inline SVG.

Names come from strangers: every text is escaped, and the page's own policy lets no script run but the one below.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from torchchat_core.amounts import size_text
from torchchat_core.measure.chart import FRONT_SENTENCE, Axis, Box, Panel, Point, panels, place_labels
from torchchat_core.measure.comparing import Comparison
from torchchat_core.measure.summary import (
    COLUMNS,
    cells,
    left_alone_lines,
    method_lines,
    noise_lines,
    refused_lines,
)

PAGES = Path(__file__).resolve().parent.parent / "data" / "pages"
WIDTH, HEIGHT = 620, 400  # of a chart, in its own pixels
FRAME = Box(64, 34, 540, 316)  # of a chart's axes
LETTER, LINE = 6.3, 13.0  # of a label's 11 px: the width of a wide letter, and the height


def html_page(comparison: Comparison) -> str:
    """The whole page."""
    style = (PAGES / "comparison.css").read_text(encoding="utf-8")
    script = (PAGES / "comparison.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = escape(f"Quantising {comparison.model}")
    charts = "\n".join(f"<figure>{_chart(panel)}</figure>" for panel in panels(comparison))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{_paragraphs((*method_lines(comparison), *noise_lines(comparison)), "faint")}
<div class="charts">
{charts}
</div>
<p>Filled circles and shaded rows are {escape(FRONT_SENTENCE)}. The area of a circle grows with the decoding speed. A
line is the front of the two quantities of its chart.</p>
<div class="wide">
{_table(comparison)}
</div>
{_list("Not measured", refused_lines(comparison))}
{_list("Layers that were left alone", left_alone_lines(comparison))}
<script>{script}</script>
</body>
</html>
"""


def _paragraphs(lines: Iterable[str], kind: str) -> str:
    return f'<p class="{kind}">' + "<br>\n".join(map(escape, lines)) + "</p>"


def _list(heading: str, lines: Iterable[str]) -> str:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{heading}</h2>\n<ul>\n{items}\n</ul>" if items else ""


def _table(comparison: Comparison) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in COLUMNS)
    rows = []
    for row in comparison.rows:
        kind = ' class="best"' if row in comparison.front else ""
        found = "".join(f'<td data-value="{escape(str(value))}">{escape(text)}</td>'
                        for text, value in cells(row, comparison))
        rows.append(f"<tr{kind}>{found}</tr>")
    return f"<table>\n<caption>A click on a heading sorts.</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n" \
           + "\n".join(rows) + "\n</tbody>\n</table>"


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
