"""Encoding of long texts slice by slice, with the ids that the whole text has.

A tokenizer needs some hundred bytes of memory for each character that it encodes at once, and cannot be interrupted.
Neighboring slices overlap, and are joined at a token of which both agree: the same ids at the same places, some way
before the first slice ends and some way after the second one begins. That is the encoding of the whole. A pre-tokenizer
scans from left to right, and looks ahead and behind by a few characters only. Merges by rank are right where every two
neighboring tokens are (each pair lies in one of the slices), and of two best paths that meet the parts are best, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torchchat_core.errors import TorchchatError

SLICE = 16_384  # characters that are encoded at once
EDGE = 128  # characters at a slice's ends that may be encoded otherwise than within the text
LONGEST_SLICE = 1 << 17  # characters, where no place to cut is found before: some tenths of a second
TRIES = 8  # places at which a slice may begin


class UncutTextError(TorchchatError):
    """A text has a part too long to be encoded at once, without a place to cut it."""


Encode = Callable[[str], tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class _Slice:
    start: int  # in the text, as are those of the tokens
    end: int
    ids: Sequence[int]
    starts: Sequence[int]


def slices(text: str, encode: Encode, size: int = SLICE, edge: int = EDGE, longest: int = LONGEST_SLICE
           ) -> Iterator[Sequence[int]]:
    """Yield the ids of `text` in parts. `encode` returns the ids of a text and where in it each of them starts.

    Raises `UncutTextError` where more than `longest` characters cannot be cut.
    """

    def encoded(start: int, end: int) -> _Slice:
        ids, starts = encode(text[start:end])
        return _Slice(start, end, ids, [start + each for each in starts])

    current, first = encoded(0, min(size, len(text))), 0  # `first`: the first token that was not yielded
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
    """The slice after `current`, the number of tokens of `current` before it, and where in it they continue."""
    near = bisect_left(current.starts, current.end - 4 * edge)
    tried = {start for start in current.starts[max(0, near - TRIES) : near + 1] if start > current.start + edge}
    for start in sorted(tried, reverse=True):
        if _joint(current, encoded(start, current.end), edge) is None:  # a look that costs little
            continue
        after = encoded(start, min(length, start + size))
        joint = _joint(current, after, edge)
        if joint is not None and after.end > current.end:
            return after, *joint
    return None


def _joint(before: _Slice, after: _Slice, edge: int) -> tuple[int, int] | None:
    """Where the tokens of both begin that are the same in both, apart from the edges; None where they differ."""
    from_place, to_place = after.start + edge, before.end - edge
    left = slice(bisect_left(before.starts, from_place), bisect_left(before.starts, to_place))
    right = slice(bisect_left(after.starts, from_place), bisect_left(after.starts, to_place))
    same = (before.ids[left] == after.ids[right] and before.starts[left] == after.starts[right]
            and left.stop - left.start > 1)
    return (left.start, right.start) if same else None
