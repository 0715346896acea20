"""How fast a loaded model reads a prompt (prefill) and goes on with it (decode), in tokens per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.specs import LoadedModel

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One quantity over several runs."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median=statistics.median(values), lowest=min(values), highest=max(values))

    @property
    def spread(self) -> float:
        """Half of the range, as a share of the median: 0.05 reads "plus or minus 5 %"."""
        return (self.highest - self.lowest) / 2 / self.median


@dataclass(frozen=True, kw_only=True)
class Rate(Spread):
    """Tokens per second over several runs."""

    def beats(self, other: Rate) -> bool:
        """Whether it is the higher one for certain: the ranges do not touch."""
        return self.lowest > other.highest


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a model is, and what was measured."""

    prefill: Rate
    decode: Rate
    first_token: Spread  # seconds from the prompt to its first token: the prefill, and choosing the likeliest
    warm_up: float  # seconds of the run before those that count
    prompt_tokens: int
    new_tokens: int
    repeats: int


def measure_rates(model: LoadedModel, ids: Sequence[int], name: str, *, prompt_tokens: int = PROMPT_TOKENS,
                  new_tokens: int = NEW_TOKENS, repeats: int = REPEATS) -> Rates:
    """Prefill of `prompt_tokens` of `ids`, which are repeated where they are too few, then `new_tokens` steps.

    The first run warms up, and is not counted. Sampling is no part of it. Both numbers of tokens are cut to what the
    model can hold, two thirds of it for the prompt; `name` is for progress. Raises `TorchchatError` for a model that
    holds fewer than 2 tokens, or where there is nothing to measure.
    """
    if not ids or min(prompt_tokens, new_tokens, repeats) < 1:
        raise TorchchatError("there is nothing to measure the speed with: tokens and repeats have to be 1 or more")
    if model.max_context < 2:
        raise TorchchatError(f"a model that holds {model.max_context} tokens decodes nothing")
    if prompt_tokens + new_tokens > model.max_context:
        prompt_tokens = min(prompt_tokens, max(model.max_context * 2 // 3, 1))
        new_tokens = min(new_tokens, model.max_context - prompt_tokens)
    needed = prompt_tokens + new_tokens
    tokens = (list(ids) * (needed // len(ids) + 1))[:needed]
    runs = []
    with progress.task(f"{name}: speed", total=repeats + 1) as task:
        for _ in range(repeats + 1):
            runs.append(_one_run(model, tokens[:prompt_tokens], tokens[prompt_tokens:]))
            task.advance(1)
    prefill, first_token, decode = zip(*runs[1:], strict=True)
    return Rates(prefill=_rate(prompt_tokens, prefill), decode=_rate(new_tokens, decode),
                 first_token=Spread.of(first_token), warm_up=runs[0][1] + runs[0][2], prompt_tokens=prompt_tokens,
                 new_tokens=new_tokens, repeats=repeats)


def _one_run(model: LoadedModel, prompt: Sequence[int], following: Sequence[int]) -> tuple[float, float, float]:
    """Seconds of the prefill, of it and the choice of a token, and of the steps together.

    Logits come to the CPU, so that a GPU has finished.
    """
    session = model.session(len(prompt) + len(following))
    try:
        started = time.perf_counter()
        logits = session.prefill(prompt)
        prefilled = time.perf_counter()
        logits.argmax().item()
        chosen = time.perf_counter()
        for token in following:
            session.decode(token)
        return prefilled - started, chosen - started, time.perf_counter() - chosen
    finally:
        session.close()


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    return Rate(median=tokens / statistics.median(seconds), lowest=tokens / max(seconds),
                highest=tokens / min(seconds))
