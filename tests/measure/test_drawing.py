"""The charts, the page and the picture: what they show, where labels find room, and that markup stays text."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.chart import Axis, Box, panels, place_labels
from torchchat_core.measure.comparing import Comparison, Row
from torchchat_core.measure.page import html_page
from torchchat_core.measure.png import draw_png
from torchchat_core.measure.text import MeasuredText

Make = Callable[..., Row]


def comparison_of(*rows: Row) -> Comparison:
    text = MeasuredText(name="t", content="t", read=1, whole=1)
    return Comparison(model="m", text=text, window=2, rows=rows, refused=())


# ---- charts -------------------------------------------------------------------------------------------------------


def test_the_line_joins_the_rows_that_are_best_in_the_two_quantities_of_the_panel(made_row: Make) -> None:
    rows = [made_row("unquantised", 100, 0.0, perplexity=4.0), made_row("large", 60, 0.3, perplexity=4.1),
            made_row("small", 30, 0.2, perplexity=5.0), made_row("lucky", 40, 0.4, perplexity=3.9)]
    perplexity, divergence = panels(comparison_of(*rows))
    assert [point.name for point in perplexity.staircase] == ["small", "lucky"]
    assert [point.name for point in divergence.staircase] == ["small"]


def test_rows_without_divergence_are_named_beside_the_logarithmic_axis(made_row: Make) -> None:
    _, divergence = panels(comparison_of(made_row("unquantised", 100, 0.0), made_row("small", 50, 0.1)))
    assert divergence.at_zero == ("unquantised",)
    assert [point.name for point in divergence.points] == ["small"]


def test_perplexities_of_different_magnitudes_get_a_logarithmic_axis(made_row: Make) -> None:
    near = comparison_of(made_row(perplexity=5.0), made_row(perplexity=6.0))
    far = comparison_of(made_row(perplexity=5.0), made_row(perplexity=5000.0))
    assert not panels(near)[0].logarithmic
    assert panels(far)[0].logarithmic


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0000001], [0.001, 900.0], [1e9, 1.7e9], [3e-7, 4e-7], [30.0, 37.0]])
def test_axes_hold_all_values_and_have_a_few_round_marks(values: list[float], logarithmic: bool) -> None:
    axis = Axis.around(values, logarithmic)
    assert all(0 < axis.share(value) < 1 for value in values)
    assert 2 <= len(axis.ticks) <= 9
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert axis.ticks == sorted(set(axis.ticks))


def test_labels_cover_neither_circles_nor_each_other() -> None:
    room = Box(0, 0, 500, 300)
    circles = [(100.0, 150.0, 8.0), (104.0, 152.0, 8.0), (104.0, 152.0, 6.0), (490.0, 295.0, 8.0), (300.0, 20.0, 5.0)]
    boxes = place_labels(circles, [80] * 5, 12, room)
    assert all(box.within(room) for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    drawn = [Box(x - r, y - r, 2 * r, 2 * r) for x, y, r in circles]
    assert not any(box.overlaps(circle) for box in boxes for circle in drawn)


# ---- the page -----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, and the texts in each kind of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((self._open[-1], data))


def test_names_from_strangers_are_text_and_never_markup(hostile: Comparison) -> None:
    elements = Elements(html_page(hostile))
    assert [tag for tag, _ in elements.tags].count("script") == 1
    name = hostile.model
    assert ("title", f"Quantising {name}") in elements.texts
    assert ("td", name) in elements.texts
    assert any(kind == "li" and name in text for kind, text in elements.texts)
    assert not any(key.startswith("on") for _, attributes in elements.tags for key in attributes)


def test_the_page_asks_for_nothing_from_elsewhere(hostile: Comparison) -> None:
    page = html_page(hostile)
    assert not re.search(r"(https?:|//\w|url\(|@import|\bsrc=|<link|\bhref=|\bfetch\()", page)
    assert not {tag for tag, _ in Elements(page).tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}


def test_the_policy_of_the_page_lets_its_own_script_run_alone(hostile: Comparison) -> None:
    elements = Elements(html_page(hostile))
    policy = next(attributes["content"] for tag, attributes in elements.tags if "http-equiv" in attributes)
    script = "".join(text for kind, text in elements.texts if kind == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_page_has_a_row_for_each_model_two_charts_and_marks_the_front(made_row: Make) -> None:
    rows = [made_row("unquantised", 100, 0.0), made_row("good", 50, 0.1), made_row("bad", 60, 0.2)]
    elements = Elements(html_page(comparison_of(*rows)))
    kinds = [tag for tag, _ in elements.tags]
    assert kinds.count("svg") == 2
    assert kinds.count("tr") == 4
    assert kinds.count("circle") == 3 + 2
    best = [attributes.get("class") for tag, attributes in elements.tags if tag == "tr"]
    assert best == [None, "best", "best", None]
    assert [attributes["data-value"] for tag, attributes in elements.tags if tag == "td"][1::11] == ["100", "50", "60"]


def test_a_page_of_the_unquantised_model_alone_can_be_made(made_row: Make) -> None:
    assert "at 0: unquantised" in html_page(comparison_of(made_row("unquantised", 100, 0.0)))


# ---- the picture --------------------------------------------------------------------------------------------------


def test_the_picture_is_a_png_whatever_the_names_are(hostile: Comparison) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    content = draw_png(hostile, hostile.model)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") == 1400


def test_a_picture_of_the_unquantised_model_alone_can_be_drawn(made_row: Make) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert draw_png(comparison_of(made_row("unquantised", 100, 0.0)), "m").startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_how_to_get_it(hostile: Comparison, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    monkeypatch.setattr("torchchat_core.measure.png.find_spec", lambda _: None)
    with pytest.raises(TorchchatError, match="matplotlib, which is not installed") as refused:
        draw_png(hostile, "m")
    assert refused.value.fix is not None
    assert "torchchat-core[plot]" in refused.value.fix


def test_drawing_does_without_pyplot_and_its_global_state(hostile: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    assert draw_png(hostile, "m").startswith(b"\x89PNG")
