"""The picture of a comparison, drawn by matplotlib (`torchchat-core[plot]`)."""

from __future__ import annotations

import io
import math
import warnings
from importlib.util import find_spec
from typing import Any

from torchchat_core.amounts import size_text
from torchchat_core.errors import TorchchatError
from torchchat_core.measure.chart import FRONT_SENTENCE, Box, Panel, Point, panels, place_labels
from torchchat_core.measure.comparing import Comparison

DOTS = 100  # per inch
FONT = 9.0  # points
INK, FRONT, FAINT = "#20242b", "#1f6fd0", "#8a93a0"


def require_matplotlib() -> None:
    """Raises `TorchchatError` where it is not installed."""
    if find_spec("matplotlib") is None:
        raise TorchchatError("a PNG is drawn by matplotlib, which is not installed",
                             "pip install 'torchchat-core[plot]', or --plot FILE.html, which needs nothing")


def draw_png(comparison: Comparison, heading: str) -> bytes:
    """The picture as a PNG file. Raises `TorchchatError` where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.6), dpi=DOTS, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.06, right=0.97, top=0.87, bottom=0.17, wspace=0.14)
    figure.text(0.06, 0.94, heading, fontsize=FONT + 3, color=INK, parse_math=False)
    figure.text(0.06, 0.035, f"Filled: {FRONT_SENTENCE}.\nArea: decoding speed. Line: the front of the two quantities "
                             "of its panel.", fontsize=FONT, color=INK, parse_math=False)
    drawn = [(figure.add_subplot(1, 2, place), panel) for place, panel in enumerate(panels(comparison), 1)]
    for axes, panel in drawn:
        _draw(axes, panel)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name in a script that the font lacks
        canvas.draw()  # only then is it known where the points are
        for axes, panel in drawn:
            _label(axes, panel, canvas)
        canvas.print_png(content)
    return content.getvalue()


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=FONT + 1, color=INK, loc="left")
    axes.set_xlabel("bytes of the weights", fontsize=FONT, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _position: size_text(round(value)))
    axes.tick_params(labelsize=FONT, colors=INK)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.logarithmic and panel.points:
        axes.set_yscale("log")
    steps = panel.staircase
    axes.step([point.x for point in steps], [point.y for point in steps], where="post", color=FRONT, linewidth=1.2,
              alpha=0.5)
    for point in panel.points:
        axes.plot([point.x], [point.y], "o", markersize=2 * _radius(point) * 72 / DOTS, color=FRONT,
                  markerfacecolor=FRONT if point.on_front else "white", alpha=0.85)
    if panel.at_zero:
        axes.text(0.99, 0.98, f"at 0: {', '.join(panel.at_zero)}", transform=axes.transAxes, ha="right", va="top",
                  fontsize=FONT, color=INK, parse_math=False)


def _radius(point: Point) -> float:
    """Of its circle, in pixels: the area grows with the speed."""
    return 4 + 7 * math.sqrt(point.size)


def _label(axes: Any, panel: Panel, canvas: Any) -> None:
    """Names beside the points, with a line to those that are farther away."""
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2.5, foreground="white")  # where a label lies on a line
    height = canvas.get_width_height()[1]
    texts = [axes.text(0, 0, point.label, fontsize=FONT, color=INK, parse_math=False) for point in panel.points]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for text in texts:
        text.remove()
    centres = [axes.transData.transform((point.x, point.y)) for point in panel.points]
    circles = [(float(x), height - float(y), _radius(point)) for (x, y), point in zip(centres, panel.points,
                                                                                  strict=True)]
    frame = axes.get_window_extent()
    room = Box(frame.x0, height - frame.y1, frame.width, frame.height - 2)
    tall = max((each.height for each in extents), default=0)
    for point, circle, box in zip(panel.points, circles, place_labels(circles, [each.width for each in extents], tall,
                                                                      room), strict=True):
        offset = ((box.left - circle[0]) * 72 / DOTS, (circle[1] - box.top - box.height) * 72 / DOTS)
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": circle[2] * 72 / DOTS}
        axes.annotate(point.label, (point.x, point.y), offset, textcoords="offset points", fontsize=FONT, color=INK,
                      va="bottom", parse_math=False, path_effects=[halo], arrowprops=line)
