"""The one error root. A message says what happened, with the value; a fix says what to do about it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

QUOTED_LENGTH = 60  # characters of a value that a message shows


class TorchchatError(Exception):
    """Something a person can understand and act upon.

    `message` states what happened and the value concerned; `fix`, where there is one, is the next thing to try.
    The command line prints both without a traceback and exits with status 1.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


def quoted(value: object) -> str:
    """Return `repr(value)` for a message, cut to 60 characters; a cut value ends in "...".

    Long strings and large containers are cut before they are formatted, so the cost does not depend on their size.
    """
    text = _SHORT_REPR.repr(value)
    return text if len(text) <= QUOTED_LENGTH else text[:QUOTED_LENGTH - 3] + "..."


def shortened(text: str, length: int = 300) -> str:
    """Return the text of another program or library for a message, cut to `length` characters; a cut ends in "..."."""
    return text if len(text) <= length else text[:length - 3] + "..."


class _ShortRepr(reprlib.Repr):
    """`repr` whose cut strings keep their beginning, not their middle."""

    def repr_str(self, x: str, _level: int) -> str:
        return repr(x) if len(x) < QUOTED_LENGTH else repr(x[:QUOTED_LENGTH])

    def repr_int(self, x: int, _level: int) -> str:
        bits = x.bit_length()  # Python refuses to format an integer of more than 4300 digits
        return repr(x) if bits < 10_000 else f"<an integer of {bits} bits>"

    def repr_bytes(self, x: bytes, _level: int) -> str:
        return repr(x) if len(x) < QUOTED_LENGTH else repr(x[:QUOTED_LENGTH])


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlist = _SHORT_REPR.maxtuple = _SHORT_REPR.maxdict = _SHORT_REPR.maxset = 20
_SHORT_REPR.maxother = QUOTED_LENGTH


def near_matches(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the `known` names that look like `name`, best first; upper and lower case are the same."""
    by_folded = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_folded, n=count, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(None, folded, name.lower()).ratio() for folded in found]
    return [by_folded[folded] for folded, ratio in zip(found, likeness, strict=True) if ratio > likeness[0] - 0.1]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """"did you mean A, B or C?" for the near matches of `name`, or None where nothing is near."""
    matches = near_matches(name, known)
    if not matches:
        return None
    listed = ", ".join(matches[:-1]) + " or " + matches[-1] if len(matches) > 1 else matches[0]
    return f"did you mean {listed}?"
