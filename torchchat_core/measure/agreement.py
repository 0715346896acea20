"""How well two models agree on the same tokens: their logits, what follows from them, and where they differ most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.divergence import Reference
from torchchat_core.measure.passages import Continuation, Exercise, Rows
from torchchat_core.measure.perplexity import BLOCK, check_logits
from torchchat_core.specs import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Place:
    """A position of a passage, and the way in which the session came there."""

    way: str
    passage: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two greedy continuations part: each model's candidate, and by how much each prefers its own."""

    place: Place
    tokens: tuple[int, int]  # of the first model and of the second
    gaps: tuple[float, float]  # logits between the two candidates, to each model


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two models on the same tokens; the KL divergence is that of the second one from the first, in nats."""

    positions: int  # that were compared
    largest_difference: float  # of two logits
    largest_at: Place
    mean_difference: float  # of absolute values, over all positions and tokens of the vocabulary
    mean_kl: float
    p99_kl: float  # 99 of 100 positions have no larger one
    top_1: float  # share of the positions at which both find the same token likeliest
    top_5: float  # share of the five likeliest tokens that both have in common
    greedy_tokens: int  # that the first model chose
    greedy_agreed: int  # of them, those before the second one would have chosen another, in each continuation
    first_difference: Difference | None


def recorded(model: LoadedModel, exercise: Sequence[Exercise], scores: bool, reference: Reference) -> Iterator[Rows]:
    """What the first model says, kept in the reference as it comes."""
    for rows in _all_rows(model, exercise, scores):
        reference.keep(rows.logits)
        yield rows


def _all_rows(model: LoadedModel, exercise: Sequence[Exercise], scores: bool) -> Iterator[Rows]:
    for each in exercise:
        for rows in each.rows(model, scores):
            check_logits(rows.logits)
            yield rows


@dataclass
class AgreementSum:
    """Adds up how the second model agrees with what a reference holds of the first."""

    reference: Reference
    continuations: dict[int, Continuation]
    kl: list[float] = field(default_factory=list)
    largest: tuple[float, Place | None] = (-1.0, None)
    differences: float = 0.0  # their sum
    logits: int = 0  # that were compared
    same_first: int = 0
    same_five: int = 0
    parted: dict[int, Difference] = field(default_factory=dict)  # continuation -> where
    agreed: int = 0

    def observed(self, model: LoadedModel, exercise: Sequence[Exercise], scores: bool) -> Iterator[Rows]:
        """The rows of the second model as they come, each compared."""
        self.reference.rewind()
        for rows in _all_rows(model, exercise, scores):
            for start in range(0, len(rows.logits), BLOCK):
                block = rows.logits[start : start + BLOCK]
                self._add(Rows(rows.way, rows.passage, rows.position + start, block))
            yield rows

    def _add(self, rows: Rows) -> None:
        first, second = self.reference.positions(len(rows.logits)).double(), rows.logits.double()
        self.kl += _divergences(first, second)
        self._add_differences(first, second, rows)
        count = min(5, first.shape[-1])
        ours, theirs = first.topk(count).indices, second.topk(count).indices
        self.same_first += int((ours[:, 0] == theirs[:, 0]).sum())
        self.same_five += int((ours[:, :, None] == theirs[:, None, :]).sum())
        if rows.way == "greedy":
            self._add_greedy(first[0], second[0], rows)

    def _add_differences(self, first: Tensor, second: Tensor, rows: Rows) -> None:
        apart = torch.where(first == second, 0.0, (first - second).abs())  # two that are -inf are the same
        largest = apart.amax(-1)
        self.differences += float(apart.sum())
        self.logits += apart.numel()
        if float(largest.max()) > self.largest[0]:
            place = Place(way=rows.way, passage=rows.passage, position=rows.position + int(largest.argmax()))
            self.largest = float(largest.max()), place

    def _add_greedy(self, first: Tensor, second: Tensor, rows: Rows) -> None:
        if rows.passage in self.parted:
            return
        continuation = self.continuations[rows.passage]
        step = rows.position - len(continuation.prompt) + 1
        ours, theirs = continuation.chosen[step], int(second.argmax())
        if ours == theirs:
            self.agreed += 1
            return
        place = Place(way=rows.way, passage=rows.passage, position=rows.position)
        gaps = float(first[ours] - first[theirs]), float(second[theirs] - second[ours])
        self.parted[rows.passage] = Difference(place=place, tokens=(ours, theirs), gaps=gaps)

    @property
    def result(self) -> Agreement:
        """Raises `TorchchatError` where nothing was compared."""
        if self.largest[1] is None:
            raise TorchchatError("nothing was compared")
        positions, vocab = len(self.kl), self.logits // len(self.kl)
        earliest = min(self.parted.values(), key=lambda each: (each.place.position, each.place.passage), default=None)
        return Agreement(
            positions=positions, largest_difference=self.largest[0], largest_at=self.largest[1],
            mean_difference=self.differences / self.logits, mean_kl=math.fsum(self.kl) / positions,
            p99_kl=float(np.quantile(self.kl, 0.99, method="higher")), top_1=self.same_first / positions,
            top_5=self.same_five / positions / min(5, vocab),
            greedy_tokens=sum(each.count for each in self.continuations.values()), greedy_agreed=self.agreed,
            first_difference=earliest)


def _divergences(first: Tensor, second: Tensor) -> list[float]:
    """KL(first || second) of each row of logits [positions, vocab], in nats; infinite where the second rules out what
    the first does not."""
    ours, theirs = first.log_softmax(-1), second.log_softmax(-1)
    terms = torch.where(ours.exp() > 0, ours.exp() * (ours - theirs), 0.0)
    found: list[float] = terms.sum(-1).clamp(min=0.0).tolist()
    return found
