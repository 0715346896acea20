"""Log-probabilities of the tokens of prompts: what evaluations ask for with `echo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.generation import PREFILL_CHUNK, TokenLogprobs
from torchchat_core.server.engine import Engine
from torchchat_core.server.errors import ApiError
from torchchat_core.specs import LoadedModel, ScoringSession


@dataclass(frozen=True)
class Scored:
    """Of each token of a prompt; None for the first one, before which there is nothing."""

    logprobs: list[TokenLogprobs | None]


async def score_prompts(engine: Engine, prompts: Sequence[Sequence[int]], top: int) -> list[Scored]:
    """One after the other, between steps of the model. Raises `ApiError` 400 without the ability `score`."""
    try:
        engine.opened.executor.require("score")
    except TorchchatError as error:
        raise ApiError(400, f"logprobs of an echoed prompt: {error.message}", "echo", "unsupported_parameter") from None
    return await engine.call_for_each(lambda model, prompt: _score(model, prompt, top), prompts)


def _score(model: LoadedModel, prompt: Sequence[int], top: int) -> Scored:
    session = cast(ScoringSession, model.session(len(prompt)))
    found: list[TokenLogprobs | None] = [None]
    try:
        for start in range(0, len(prompt) - 1, PREFILL_CHUNK):
            part = prompt[start : min(start + PREFILL_CHUNK, len(prompt) - 1)]
            rows = torch.log_softmax(session.score(part).double(), 1)  # [part, vocab]
            following = prompt[start + 1 : start + 1 + len(part)]
            best = torch.topk(rows, min(top, rows.shape[1]), dim=1)
            chosen = rows[torch.arange(len(part)), torch.tensor(following)].tolist()
            found += [TokenLogprobs(chosen=logprob, top=tuple(zip(ids, values, strict=True))) for logprob, ids, values
                      in zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True)]
    finally:
        session.close()
    return Scored(found)
