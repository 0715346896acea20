"""Encode long texts in slices, with the same ids as for the whole text.

A tokenizer needs a few hundred bytes of memory per character of a text, and cannot be interrupted. Neighboring slices
overlap and are joined where both have the same ids at the same positions, some distance before the end of the first
slice and after the start of the second. The result is the encoding of the whole text: a pre-tokenizer scans from left
to right and looks only a few characters ahead and behind; merges by rank are correct if every pair of neighboring
tokens is (each pair lies within one slice); and where two best paths meet, their parts are best, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torchchat_core.errors import TorchchatError

SLICE = 16_384  # characters that are encoded at once
EDGE = 128  # characters at a slice's ends that may be encoded otherwise than within the text
LONGEST_SLICE = 1 << 17  # characters, if there is no position to cut; takes a few tenths of a second
TRIES = 8  # candidate start positions of a slice


class UncutTextError(TorchchatError):
    """A text has a part that is too long to encode at once and cannot be cut."""


Encode = Callable[[str], tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class _Slice:
    start: int  # positions in the text, as in `starts`
    end: int
    ids: Sequence[int]
    starts: Sequence[int]


def slices(text: str, encode: Encode, size: int = SLICE, edge: int = EDGE, longest: int = LONGEST_SLICE
           ) -> Iterator[Sequence[int]]:
    """Yield the ids of `text` in parts. `encode` returns the ids of a text and the position where each starts.

    Raises `UncutTextError` if more than `longest` characters cannot be cut.
    """

    def encoded(start: int, end: int) -> _Slice:
        ids, starts = encode(text[start:end])
        return _Slice(start, end, ids, [start + each for each in starts])

    current, first = encoded(0, min(size, len(text))), 0  # `first`: index of the first token not yet yielded
    while current.end < len(text):
        following = _following(current, encoded, min(size, len(text)), edge, len(text))
        if following is not None:
            after, last, begin = following
            yield current.ids[first:last]
            current, first = after, begin
        elif current.end - current.start >= longest:
            raise UncutTextError(f"more than {longest} characters of the text cannot be cut between tokens",
                                 "shorten the text, or put spaces between its words")
        else:
            current = encoded(current.start, min(len(text), 2 * current.end - current.start))
    yield current.ids[first:]


def _following(current: _Slice, encoded: Callable[[int, int], _Slice], size: int, edge: int, length: int
               ) -> tuple[_Slice, int, int] | None:
    """Return the next slice, the number of tokens of `current` before the joint, and the index of the joint in it."""
    near = bisect_left(current.starts, current.end - 4 * edge)
    tried = {start for start in current.starts[max(0, near - TRIES) : near + 1] if start > current.start + edge}
    for start in sorted(tried, reverse=True):
        if _joint(current, encoded(start, current.end), edge) is None:  # a cheap check first
            continue
        after = encoded(start, min(length, start + size))
        joint = _joint(current, after, edge)
        if joint is not None and after.end > current.end:
            return after, *joint
    return None


def _joint(before: _Slice, after: _Slice, edge: int) -> tuple[int, int] | None:
    """Return the indices in both slices where their common tokens begin, ignoring the edges; None if they differ."""
    from_position, to_position = after.start + edge, before.end - edge
    left = slice(bisect_left(before.starts, from_position), bisect_left(before.starts, to_position))
    right = slice(bisect_left(after.starts, from_position), bisect_left(after.starts, to_position))
    same = (before.ids[left] == after.ids[right] and before.starts[left] == after.starts[right]
            and left.stop - left.start > 1)
    return (left.start, right.start) if same else None
