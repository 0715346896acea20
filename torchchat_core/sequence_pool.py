"""Sequences of one model that outlive their answers, so that prompts which begin alike are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchchat_core.generation import TokenSequence, shared_length
from torchchat_core.models.kv_cache import FIRST_CAPACITY
from torchchat_core.specs import LoadedModel

WORTH_COPYING = 16  # tokens: below it, a new sequence computes them as soon as a copy is made


class SequencePool:
    """Gives sequences to answers and takes them back, least recently used ones go first where there are too many.

    Not thread-safe: it belongs to the one thread that runs the model.
    """

    def __init__(self, model: LoadedModel, *, limit: int, kept_tokens: int, forks: bool) -> None:
        """`limit`: tokens of a sequence; `kept_tokens`: for which all idle ones together have memory; `forks`: whether
        the executor has the ability `fork`."""
        self._model = model
        self._limit = limit
        self._kept_tokens = kept_tokens
        self._forks = forks
        # Positions that each has memory for, and of busy ones what they had when they were taken: a cache doubles when
        # it grows, and a cut gives nothing back.
        self._idle: dict[TokenSequence, int] = {}  # least recently used first
        self._busy: dict[TokenSequence, int] = {}

    @property
    def held_tokens(self) -> int:
        """Tokens that all caches have memory for."""
        return sum(self._idle.values()) + sum(self._positions(*each) for each in self._busy.items())

    def _positions(self, sequence: TokenSequence, before: int) -> int:
        needed = 1 << max(sequence.session.length - 1, 0).bit_length()
        return max(before, min(max(FIRST_CAPACITY, needed), self._limit))

    def take(self, prompt: Sequence[int]) -> TokenSequence:
        """A sequence that is not in use, and holds as much of the prompt's beginning as can be had.

        An idle one that holds much else is copied rather than cut, where the executor can.
        """
        tokens = list(prompt[:-1])
        sequence = self._from_idle(tokens)
        before = 0 if sequence is None else self._idle.pop(sequence)
        sequence = sequence or self._copied(tokens) or TokenSequence(self._model.session(self._limit))
        self._busy[sequence] = before
        return sequence

    def give(self, sequence: TokenSequence) -> None:
        """Takes a sequence back. One that is too short to be worth a copy is not kept."""
        if sequence.session.length < WORTH_COPYING:
            self.drop(sequence)
            return
        self._idle[sequence] = self._positions(sequence, self._busy.pop(sequence))
        while sum(self._idle.values()) > self._kept_tokens:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.session.close()

    def drop(self, sequence: TokenSequence) -> None:
        """Closes a sequence that failed, or is of no use."""
        del self._busy[sequence]
        sequence.session.close()

    def close(self) -> None:
        for sequence in (*self._idle, *self._busy):
            sequence.session.close()
        self._idle, self._busy = {}, {}

    def _from_idle(self, tokens: list[int]) -> TokenSequence | None:
        """The idle one that shares most with the tokens, unless that would throw more away than it saves."""
        best, shared = self._nearest(self._idle, tokens)
        if best is None:
            return None
        lost = best.session.length - shared
        return None if self._forks and lost > shared // 2 else best

    def _copied(self, tokens: list[int]) -> TokenSequence | None:
        if not self._forks:
            return None
        best, shared = self._nearest([*self._busy, *self._idle], tokens)
        return best.fork(shared) if best is not None else None

    @staticmethod
    def _nearest(sequences: Iterable[TokenSequence], tokens: list[int]) -> tuple[TokenSequence | None, int]:
        """The one that shares most with the tokens, and how much; None where nothing is worth copying."""
        best, most = None, 0
        if len(tokens) < WORTH_COPYING:
            return best, most
        beginning = tokens[:WORTH_COPYING]
        for sequence in sequences:
            if sequence.begins_with(beginning):
                shared = shared_length(sequence.held, tokens)
                if shared > most:
                    best, most = sequence, shared
        return best, most
