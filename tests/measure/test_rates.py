"""Tokens per second, by a clock that the test moves."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.rates import Rate, Spread, measure_rates


class Timed:
    """A model whose prefill and steps take seconds that the test chooses, run by run."""

    max_context = 100

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefills: list[float], steps: list[float]) -> None:
        self.now, self.run, self.prompts, self.decoded, self.closed = 0.0, -1, list[int](), 0, 0
        self.prefills, self.steps = prefills, steps
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def session(self, limit: int | None = None) -> Any:
        self.run += 1
        return self

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        self.prompts.append(len(tokens))
        self.now += self.prefills[self.run]
        return torch.zeros(3)

    def decode(self, token: int) -> None:
        self.decoded += 1
        self.now += self.steps[self.run]

    def close(self) -> None:
        self.closed += 1


def test_the_median_and_the_range_are_those_of_the_runs_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Timed(monkeypatch, [100.0, 1.0, 4.0, 2.0], [100.0, 0.5, 0.125, 0.25])
    rates = measure_rates(model, [1, 2, 3], "made", prompt_tokens=8, new_tokens=2, repeats=3)
    assert rates.prefill == Rate(median=4, lowest=2, highest=8)
    assert rates.decode == Rate(median=4, lowest=2, highest=8)
    assert rates.decode.spread == 0.75
    assert rates.first_token == Spread(median=2, lowest=1, highest=4)
    assert rates.warm_up == 300  # the prefill and two steps of the run that is not counted
    assert (model.prompts, model.decoded, model.closed) == ([8] * 4, 8, 4)


def test_a_small_context_is_shared_between_prompt_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Timed(monkeypatch, [1.0] * 2, [1.0] * 2)
    model.max_context = 30
    rates = measure_rates(model, [1], "made", repeats=1)
    assert (rates.prompt_tokens, rates.new_tokens) == (20, 10)


@pytest.mark.parametrize(("ids", "context", "message"), [([], 10, "nothing to measure"), ([1], 1, "decodes nothing")])
def test_what_cannot_be_measured_is_refused(ids: list[int], context: int, message: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Timed(monkeypatch, [], [])
    model.max_context = context
    with pytest.raises(TorchchatError, match=message):
        measure_rates(model, ids, "made")


def test_one_rate_beats_another_only_where_their_ranges_do_not_touch() -> None:
    slow, fast, between = (Rate(median=m, lowest=low, highest=high) for m, low, high in
                           [(10, 9, 11), (20, 18, 22), (14, 10, 19)])
    assert fast.beats(slow)
    assert not slow.beats(fast)
    assert not fast.beats(between)
    assert not between.beats(slow)
    assert not slow.beats(slow)
