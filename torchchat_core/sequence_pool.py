"""Sequences of one model that outlive their answers, so that prompts which begin alike are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

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
        self._idle: list[TokenSequence] = []  # least recently used first
        self._busy: list[TokenSequence] = []
        self._longest: WeakKeyDictionary[TokenSequence, int] = WeakKeyDictionary()  # length that one has had

    @property
    def held_tokens(self) -> int:
        """Tokens that all caches have memory for."""
        return sum(map(self._positions, (*self._idle, *self._busy)))

    def _positions(self, sequence: TokenSequence) -> int:
        """For which its cache has memory: it doubles when it grows, and a cut gives nothing back."""
        longest = max(self._longest.get(sequence, 0), sequence.session.length)
        return min(max(FIRST_CAPACITY, 1 << max(longest - 1, 0).bit_length()), self._limit)

    def take(self, prompt: Sequence[int]) -> TokenSequence:
        """A sequence that is not in use, and holds as much of the prompt's beginning as can be had.

        An idle one that holds much else is copied rather than cut, where the executor can.
        """
        tokens = list(prompt[:-1])
        sequence = self._from_idle(tokens) or self._copied(tokens) or self._new()
        self._busy.append(sequence)
        return sequence

    def give(self, sequence: TokenSequence) -> None:
        """Takes a sequence back. One that is too short to be worth a copy is not kept."""
        if sequence.session.length < WORTH_COPYING:
            self.drop(sequence)
            return
        self._busy = [each for each in self._busy if each is not sequence]
        self._longest[sequence] = max(self._longest.get(sequence, 0), sequence.session.length)
        self._idle.append(sequence)
        while self._idle and sum(map(self._positions, self._idle)) > self._kept_tokens:
            self._idle.pop(0).session.close()

    def drop(self, sequence: TokenSequence) -> None:
        """Closes a sequence that failed, or is of no use."""
        self._busy = [each for each in self._busy if each is not sequence]
        sequence.session.close()

    def close(self) -> None:
        for sequence in (*self._idle, *self._busy):
            sequence.session.close()
        self._idle, self._busy = [], []

    def _from_idle(self, tokens: list[int]) -> TokenSequence | None:
        """The idle one that shares most with the tokens, unless that would throw more away than it saves."""
        best, shared = self._nearest(self._idle, tokens)
        if best is None or shared < WORTH_COPYING:
            return None
        lost = best.session.length - shared
        if self._forks and lost > shared // 2:
            return None
        self._idle = [each for each in self._idle if each is not best]
        return best

    def _copied(self, tokens: list[int]) -> TokenSequence | None:
        if not self._forks:
            return None
        best, shared = self._nearest([*self._busy, *self._idle], tokens)
        return best.fork(shared) if best is not None and shared >= WORTH_COPYING else None

    def _new(self) -> TokenSequence:
        return TokenSequence(self._model.session(self._limit))

    @staticmethod
    def _nearest(sequences: Sequence[TokenSequence], tokens: list[int]) -> tuple[TokenSequence | None, int]:
        best, most = None, 0
        for sequence in sequences:
            shared = shared_length(sequence.held, tokens)
            if shared > most:
                best, most = sequence, shared
        return best, most

