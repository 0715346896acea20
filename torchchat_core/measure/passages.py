"""What two models are given to see whether they compute the same: every way through a runtime, on the same tokens.

A passage is a stretch of a text in a session of its own: read in two pieces, the second of which attends to the cache;
then token by token; then, after the session was cut, other tokens in the place of those that were there. A greedy one
goes on from the beginning of a stretch with the tokens that the first of the models finds likeliest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.perplexity import SCORED
from torchchat_core.measure.text import Window
from torchchat_core.specs import LoadedModel, ScoringSession, Session

STEPS = 8  # tokens that are decoded one by one
PROMPT, PROMPTS = 16, 4  # tokens of a beginning that is gone on with, and how many there are


@dataclass(frozen=True)
class Rows:
    """Logits at positions that follow each other."""

    way: str  # how the session came by the last tokens: "read", "decoded", "read after a cut", "decoded after a cut"
    passage: int
    position: int  # of the first row, in the session
    logits: Tensor  # [positions, vocab] float32


@dataclass(frozen=True)
class Passage:
    """A stretch of a text. `kept` tokens of it remain when the session is cut; then come those of `replaced`."""

    index: int
    read: tuple[int, ...]
    decoded: tuple[int, ...]
    kept: int
    replaced: tuple[int, ...]

    @classmethod
    def of(cls, index: int, window: Window) -> Passage:
        """A window: most of it is read, the last tokens are decoded; after the cut come its tokens from the end."""
        tokens = window.fed
        steps = min(STEPS, len(tokens) // 2)
        kept = max(1, (len(tokens) - steps) // 2)
        return cls(index, tokens[: len(tokens) - steps], tokens[len(tokens) - steps :], kept,
                   tokens[::-1][: min(2 * steps, len(tokens) - kept)])

    @property
    def positions(self) -> int:
        """At how many positions it gives logits."""
        cut = len(self.replaced)
        return len(self.read) + len(self.decoded) + (cut - cut // 2 + 1 if cut > 1 else cut)

    @property
    def longest(self) -> int:
        """Tokens that a session holds at most."""
        return max(len(self.read) + len(self.decoded), self.kept + len(self.replaced))

    def rows(self, model: LoadedModel, scores: bool) -> Iterator[Rows]:
        """What the model says. Where it does not score, the tokens but for the first are decoded, not read."""
        session = model.session(self.longest)
        try:
            yield from self._read(session, scores)
            yield from self._stepped(session, self.decoded, "decoded")
            session.truncate(self.kept)
            half = len(self.replaced) // 2
            if half:
                yield self._row("read after a cut", session, session.prefill(self.replaced[:half]))
            yield from self._stepped(session, self.replaced[half:], "decoded after a cut")
        finally:
            session.close()

    def _read(self, session: Session, scores: bool) -> Iterator[Rows]:
        if not scores:
            yield self._row("read", session, session.prefill(self.read[:1]))
            yield from self._stepped(session, self.read[1:], "decoded")
            return
        size = min(SCORED, (len(self.read) + 1) // 2)
        for start in range(0, len(self.read), size):
            logits = cast(ScoringSession, session).score(self.read[start : start + size])
            yield Rows("read", self.index, start, logits)

    def _stepped(self, session: Session, tokens: Sequence[int], way: str) -> Iterator[Rows]:
        for token in tokens:
            yield self._row(way, session, session.decode(token))

    def _row(self, way: str, session: Session, logits: Tensor) -> Rows:
        return Rows(way, self.index, session.length - 1, logits[None])


class Continuation:
    """A beginning, and the tokens that the first model finds likeliest after it; other models are given the same."""

    def __init__(self, index: int, prompt: Sequence[int], count: int) -> None:
        self.index, self.prompt, self.count = index, tuple(prompt), count
        self.chosen: list[int] = []  # by the first model that was asked

    @property
    def positions(self) -> int:
        return self.count

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.count

    def rows(self, model: LoadedModel, scores: bool) -> Iterator[Rows]:  # noqa: ARG002 - as of passages
        """What the model says where each of the tokens is chosen."""
        session = model.session(self.longest)
        first = not self.chosen
        try:
            logits = session.prefill(self.prompt)
            for step in range(self.count):
                if first:
                    self.chosen.append(int(logits.argmax()))
                yield Rows("greedy", self.index, session.length - 1, logits[None])
                if step + 1 < self.count:
                    logits = session.decode(self.chosen[step])
        finally:
            session.close()


Exercise = Passage | Continuation


def exercises(windows: Sequence[Window], limit: int, greedy_tokens: int) -> list[Exercise]:
    """The windows as passages, and continuations of the beginnings of the first of them.

    Raises `TorchchatError` where sequences of `limit` tokens leave no room for any.
    """
    passages = [Passage.of(index, window) for index, window in enumerate(windows)]
    beginnings = [window.fed[:PROMPT] for window in windows[:PROMPTS]]
    count = min(greedy_tokens, *(limit - len(beginning) for beginning in beginnings))
    if count < 1 or any(passage.longest > limit for passage in passages):
        raise TorchchatError(f"sequences of {limit} tokens are too short to compare anything with")
    return [*passages, *(Continuation(index, beginning, count) for index, beginning in enumerate(beginnings))]
