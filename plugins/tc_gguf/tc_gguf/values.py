"""What the values of a GGUF file's metadata become."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, overload


class Texts(Sequence[str]):
    """An array of texts, kept as the file's bytes and decoded when asked for.

    Bytes that are no UTF-8 become U+FFFD, as only damaged files hold them.
    """

    def __init__(self, raw: bytes, ends: array[int]) -> None:
        self._raw = raw
        self._ends = ends  # of each text in `raw`; eight bytes of length come before each text

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = self._ends[place - 1] if place else 0
        return self._raw[start + 8 : self._ends[place]].decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        raw, start = self._raw, 0
        for end in self._ends:
            yield raw[start + 8 : end].decode("utf-8", "replace")
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self._raw == other._raw
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        return f"<{len(self)} texts>"


# Arrays are of whole or of floating numbers; those of booleans are of 0 and 1.
GgufValue: TypeAlias = "bool | int | float | str | bytes | Texts | array[Any]"


def shown(value: object) -> str:
    """A value as messages have it: short, and without making a text of all of a long one."""
    if isinstance(value, array):
        return f"a list of {len(value)} numbers"
    if isinstance(value, bytes):
        return f"a text of {len(value)} bytes"
    return repr(value[:60] if isinstance(value, str) else value)[:60]
