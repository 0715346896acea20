"""Perplexity: how well a model predicts a text, window by window, over a session with ability `score`.

    perplexity = exp(mean over all predicted tokens of -log p(token | the tokens of its window before it))

as in https://huggingface.co/docs/transformers/perplexity; of the windows see `text_windows`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import PREFILL_CHUNK
from torchchat_core.measure.text import MeasuredText, Window, encoded, text_windows, window_size
from torchchat_core.pipeline import OpenedModel
from torchchat_core.specs import LoadedModel, ScoringSession

SCORED = 256  # positions whose logits a runtime gives at once: 131 MB of a vocabulary of 128,000
BLOCK = 32  # positions whose log-probabilities are held at once in float64: 33 MB of a vocabulary of 128,000


@dataclass(frozen=True)
class Block:
    """What a model says at some positions of a text."""

    log_probabilities: Tensor  # [positions, vocab] float64
    expected: Tensor  # [positions] int64, the tokens that really follow


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text."""

    mean_nll: float  # nats for each token
    tokens: int  # that were predicted

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Of a text of so many bytes of UTF-8: comparable between models with different tokenizers."""
        return self.mean_nll * self.tokens / math.log(2) / text_bytes


def scored_blocks(model: LoadedModel, windows: Sequence[Window], name: str) -> Iterator[Block]:
    """What the model says at every position of the windows, each in a session of its own; `name` is for progress.

    Raises `TorchchatError` for logits that are not numbers.
    """
    with progress.task(f"{name}: perplexity", total=sum(len(window.fed) for window in windows)) as task:
        for window in windows:
            session = cast(ScoringSession, model.session(len(window.fed)))
            try:
                for logits, expected in scored(session, window.fed, window.expected):
                    yield from _blocks(logits, expected)
            finally:
                session.close()
            task.advance(len(window.fed))


def scored(session: ScoringSession, fed: Sequence[int], expected: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Appends the tokens; what comes after the last of them: logits [n, vocab] and the tokens that follow, [n] int64.

    `expected` are the tokens that follow the last `len(expected)` of those in `fed`; the others are context.
    """
    context = len(fed) - len(expected)
    for begin in range(0, context, PREFILL_CHUNK):
        session.prefill(fed[begin : min(begin + PREFILL_CHUNK, context)])
    for begin in range(0, len(expected), SCORED):
        following = expected[begin : begin + SCORED]
        logits = session.score(fed[context + begin : context + begin + len(following)])
        yield logits, torch.tensor(following)


def _blocks(logits: Tensor, expected: Tensor) -> Iterator[Block]:
    check_logits(logits)
    for rows, tokens in zip(logits.split(BLOCK), expected.split(BLOCK), strict=True):
        yield Block(torch.log_softmax(rows.double(), dim=-1), tokens)


def check_logits(logits: Tensor) -> None:
    """Raises `TorchchatError` for logits that are not numbers; less than any number is a token that cannot follow."""
    if logits.isnan().any() or logits.isposinf().any():
        raise TorchchatError("the model computes logits that are not numbers",
                             "try another --dtype; the weights or the recipe may be damaged")


def perplexity_of(blocks: Iterable[Block]) -> Perplexity:
    """Of what a model says at the positions of a text.

    Raises `TorchchatError` where a token that really follows has, to the model, no probability at all.
    """
    total, tokens = 0.0, 0
    for block in blocks:
        total -= float(block.log_probabilities.gather(1, block.expected[:, None]).sum())
        tokens += len(block.expected)
    mean = total / tokens
    if not mean <= 700:  # whose exponential is beyond float64, or no number
        raise TorchchatError(f"the mean negative log-likelihood is {mean:g}: the model takes the text to be impossible",
                             "the weights or the recipe may be damaged")
    return Perplexity(mean_nll=mean, tokens=tokens)


# ---- of a text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TextPerplexity:
    """What was measured, and how."""

    text: MeasuredText
    window: int  # tokens
    stride: int  # tokens between the beginnings of windows
    figures: Perplexity
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self.figures.bits_per_byte(len(self.text.content.encode()))


def measure_text(opened: OpenedModel, text: MeasuredText, window: int | None = None, stride: int | None = None
                 ) -> TextPerplexity:
    """The perplexity of a text.

    Raises `TorchchatError` for a runtime without ability `score`, and for an impossible window or stride.
    """
    opened.executor.require("score")
    tokenizer = opened.text_format.tokenizer
    size = window_size(window, opened.max_seq_length)
    windows = text_windows(encoded(text, tokenizer), tokenizer.bos_id, size, stride)
    started = time.perf_counter()
    figures = perplexity_of(scored_blocks(opened.model, windows, opened.name))
    return TextPerplexity(text=text, window=size, stride=size - 1 if stride is None else stride, figures=figures,
                          seconds=time.perf_counter() - started)
