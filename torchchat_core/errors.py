"""Define the root of all errors. A message says what happened, with the value; a fix says what to do about it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

QUOTED_LENGTH = 60  # characters of a value that a message shows
LONGEST_MESSAGE, LONGEST_FIX = 900, 600  # characters
LONGEST_PATH = 300  # characters of a path or an address that a message shows
NEAR = 0.7  # smallest difflib ratio of a likely misspelling
SHORTEST_PREFIX = 3  # characters of a prefix that identify a name


class TorchchatError(Exception):
    """Something a person can understand and act upon.

    `message` states what happened and the value concerned; `fix`, where there is one, is the next thing to try.
    The command line prints both without a traceback and exits with status 1.
    Both are truncated as a safeguard, in case a value from outside was not truncated by `quoted`.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.message = shortened(message, LONGEST_MESSAGE)
        self.fix = None if fix is None else shortened(fix, LONGEST_FIX)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


class UsageError(TorchchatError):
    """A command line that is wrong on any machine and for any model; the command line exits with status 2."""


def quoted(value: object) -> str:
    """Return `repr(value)` for a message, cut to 60 characters; a cut value ends in "...".

    Long strings and large containers are cut before they are formatted, so the cost does not depend on their size.
    """
    text = _SHORT_REPR.repr(value)
    return text if len(text) <= QUOTED_LENGTH else text[:QUOTED_LENGTH - 3] + "..."


def quoted_path(text: str) -> str:
    """Return the repr of a path or URL from outside for a message, cut to 300 characters.

    The limit is larger than that of `quoted` because the end of a path matters.
    """
    return repr(text) if len(text) <= LONGEST_PATH else repr(text[:LONGEST_PATH]) + "..."


def shortened(text: str, length: int = 300) -> str:
    """Return text from another program or library for a message, cut to `length` characters; cut text ends in "..."."""
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
    """Return up to `count` of the `known` names that `name` may be a misspelling of, best first, ignoring case.

    A name matches if its similarity is at least `NEAR`, or if one of the two starts with the other (three characters or
    more). Anything less similar is unlikely to be what the user meant.
    """
    typed = name.lower()
    by_folded = {candidate.lower(): candidate for candidate in known}
    likeness = {folded: difflib.SequenceMatcher(None, folded, typed).ratio() for folded in by_folded
                if _may_be_near(typed, folded)}
    near = sorted((folded for folded, ratio in likeness.items()
                   if ratio >= NEAR or (min(len(folded), len(typed)) >= SHORTEST_PREFIX
                                        and (folded.startswith(typed) or typed.startswith(folded)))),
                  key=lambda folded: likeness[folded], reverse=True)[:count]
    return [by_folded[folded] for folded in near if likeness[folded] > likeness[near[0]] - 0.1]


def _may_be_near(typed: str, folded: str) -> bool:
    """Return False if the lengths alone rule out a match. A full comparison takes time quadratic in the lengths."""
    return len(typed) < 1000 and (folded.startswith(typed) or typed.startswith(folded)
                                  or 2 * min(len(typed), len(folded)) >= NEAR * (len(typed) + len(folded)))


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return "did you mean A, B or C?" for the near matches of `name`, or None if nothing is near."""
    matches = near_matches(name, known)
    if not matches:
        return None
    listed = ", ".join(matches[:-1]) + " or " + matches[-1] if len(matches) > 1 else matches[0]
    return f"did you mean {listed}?"
