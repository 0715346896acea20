"""What is compared with what, what becomes of what cannot run, and the Pareto front."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.measure import comparing
from torchchat_core.measure.comparing import (
    Comparison,
    Row,
    candidate,
    compare,
    default_candidates,
    dominates,
    folder_candidate,
    shortened,
)
from torchchat_core.measure.text import MeasuredText, measured_text
from torchchat_core.pipeline import ModelRequest, open_model, quantise_model
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.quantization.recipe import recipe_names

pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
pytest.importorskip("tc_quant_int8", reason="tc-quant-int8 is not installed")

Make = Callable[..., Row]
REQUEST = ModelRequest(device="cpu", executor="eager", dtype="fp32")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def text() -> MeasuredText:
    return measured_text(None, 600)


# ---- the front ----------------------------------------------------------------------------------------------------


def front(*rows: Row) -> list[str]:
    text = MeasuredText(name="t", content="t", read=1, whole=1)
    return [row.name for row in Comparison(model="m", text=text, window=2, rows=rows, refused=()).front]


def test_a_row_that_is_worse_in_everything_is_off_the_front(made_row: Make) -> None:
    assert front(made_row("good", 10, 0.1, (9, 9)), made_row("bad", 11, 0.2, (8, 8))) == ["good"]


@pytest.mark.parametrize("better", [{"size": 9}, {"kl": 0.05}, {"decode": (11.0, 12.0)}])
def test_a_row_that_is_better_in_one_thing_is_on_the_front(better: dict[str, Any], made_row: Make) -> None:
    worse = {"size": 20, "kl": 0.2, "decode": (1.0, 2.0), **better}
    assert front(made_row("a", 10, 0.1, (9.0, 10.0)), made_row("b", **worse)) == ["a", "b"]


def test_speeds_whose_ranges_touch_are_the_same(made_row: Make) -> None:
    assert front(made_row("a", 10, 0.1, (8.0, 10.0)), made_row("b", 11, 0.1, (9.0, 12.0))) == ["a"]
    assert front(made_row("a", 10, 0.1, (8.0, 9.0)), made_row("b", 11, 0.1, (10.0, 12.0))) == ["a", "b"]


def test_a_perplexity_that_fell_by_luck_does_not_push_the_unquantised_model_off_the_front(made_row: Make) -> None:
    assert front(made_row("unquantised", 20, 0.0, perplexity=5.0), made_row("lucky", 10, 0.3, perplexity=4.0)) == [
        "unquantised", "lucky"]


def test_rows_that_are_the_same_are_all_on_the_front(made_row: Make) -> None:
    assert front(made_row("a"), made_row("b")) == ["a", "b"]


def test_there_is_always_a_front_and_it_beats_nothing_in_itself(made_row: Make) -> None:
    chance = random.Random(0)
    for _ in range(200):
        rows = []
        for index in range(6):
            low = chance.randint(1, 6)
            rows.append(made_row(str(index), chance.randint(1, 3), chance.randint(0, 2), (low, low + 2)))
        names = front(*rows)
        assert names
        kept = [row for row in rows if row.name in names]
        assert not any(dominates(one, other) for one in kept for other in kept)


# ---- measuring ----------------------------------------------------------------------------------------------------


def test_a_recipe_that_changes_nothing_is_not_at_all_apart(few_runs: None, registry: Registry, text: MeasuredText
                                                           ) -> None:
    found = compare(REQUEST, [candidate('{"precision": {"dtype": "fp32"}}', REQUEST, registry)], registry, text)
    first, same = found.rows
    assert (same.divergence.mean_kl, same.divergence.top_1) == (0.0, 1.0)
    assert same.perplexity == first.perplexity
    assert same.bytes == first.bytes


def test_fewer_bits_are_fewer_bytes_and_farther_away(few_runs: None, registry: Registry, text: MeasuredText) -> None:
    wanted = [candidate(name, REQUEST, registry) for name in ("linear:int8", "linear:int4")]
    found = compare(REQUEST, wanted, registry, text)
    first, eight, four = found.rows
    assert [row.name for row in found.rows] == ["unquantised", "linear:int8", "linear:int4"]
    assert first.bytes > eight.bytes > four.bytes
    assert 0 < eight.divergence.mean_kl < four.divergence.mean_kl / 5
    assert eight.divergence.top_1 > four.divergence.top_1
    assert four.report is not None
    assert four.bytes == four.report.bytes_after
    assert first.bytes == four.report.bytes_before


def test_one_model_is_in_memory_at_a_time(few_runs: None, registry: Registry, text: MeasuredText,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    events: list[str] = []

    @contextmanager
    def watched(*arguments: Any) -> Any:
        events.append("open")
        with open_model(*arguments) as opened:
            yield opened
        events.append("closed")

    monkeypatch.setattr(comparing, "open_model", watched)
    compare(REQUEST, [candidate("linear:int8", REQUEST, registry)], registry, text)
    assert events == ["open", "closed"] * 2


def test_what_cannot_run_here_is_told_and_the_others_are_measured(few_runs: None, registry: Registry,
                                                                  text: MeasuredText) -> None:
    names = ['{"executor": {"accelerator": "tpu"}, "linear:int8": {}}', '{"linear:int4": {"groupsize": 48}}',
             "linear:int8"]
    request = ModelRequest(executor="eager", dtype="fp32")
    found = compare(request, [candidate(name, request, registry) for name in names], registry, text)
    assert [row.name for row in found.rows] == ["unquantised", "linear:int8"]
    assert [each.name for each in found.refused] == names[:2]
    assert "unknown device 'tpu'" in found.refused[0].reason
    assert "groupsize" in found.refused[1].reason


def test_a_model_that_breaks_costs_its_row_alone(few_runs: None, registry: Registry, text: MeasuredText,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(request: ModelRequest, registry: Registry) -> Any:
        if request.quantize == "linear:int4":
            raise RuntimeError("not enough memory: you tried to allocate 9 bytes")
        return open_model(request, registry)

    monkeypatch.setattr(comparing, "open_model", failing)
    wanted = [candidate(name, REQUEST, registry) for name in ("linear:int4", "linear:int8")]
    found = compare(REQUEST, wanted, registry, text)
    assert [row.name for row in found.rows] == ["unquantised", "linear:int8"]
    assert found.refused[0].reason == "RuntimeError: not enough memory: you tried to allocate 9 bytes"


def test_a_folder_measures_as_the_recipe_that_wrote_it(few_runs: None, registry: Registry, text: MeasuredText,
                                                       tmp_path: Path) -> None:
    request = ModelRequest(device="cpu", executor="eager", dtype="fp32", quantize="linear:int4")
    quantise_model(request, tmp_path / "small", registry)
    wanted = [candidate(str(tmp_path / "small"), REQUEST, registry), candidate("linear:int4", REQUEST, registry)]
    _, folder, recipe = compare(REQUEST, wanted, registry, text).rows
    assert folder.divergence == recipe.divergence
    assert folder.bytes == recipe.bytes
    with pytest.raises(TorchchatError, match=r"quantised already.*nothing to compare it with"):
        compare(ModelRequest(model=str(tmp_path / "small"), device="cpu"), [], registry, text)


def test_a_folder_of_another_model_is_refused(few_runs: None, registry: Registry, text: MeasuredText, tmp_path: Path,
                                              testdata: Path) -> None:
    other = ModelRequest(model=str(testdata / "hf/stories260K"), device="cpu", quantize="linear:int8")
    quantise_model(other, tmp_path / "other", registry)
    found = compare(REQUEST, [folder_candidate(str(tmp_path / "other"), REQUEST)], registry, text)
    assert found.refused[0].reason == "it has another vocabulary, and was not made of this model"


@pytest.mark.parametrize("window", [1, 100_000])
def test_a_window_that_the_model_does_not_take_is_refused(window: int, few_runs: None, registry: Registry,
                                                          text: MeasuredText) -> None:
    with pytest.raises(TorchchatError, match=f"--window is {window} tokens; the model takes 2 to "):
        compare(REQUEST, [], registry, text, window)


def test_by_default_every_recipe_and_every_installed_scheme_is_compared(registry: Registry) -> None:
    names = [each.name for each in default_candidates(REQUEST, registry)]
    assert set(recipe_names()) < set(names)
    assert {"linear:int8", "linear:int4", "linear:a8w4dq", "embedding:int8"} < set(names)
    assert len(names) == len(set(names))


def test_long_names_are_shortened_to_one_line() -> None:
    assert shortened("a\n  b", 8) == "a b"
    assert shortened("abcdefghij", 8) == "abcdefg\u2026"
