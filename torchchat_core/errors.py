"""The one error root. A message says what happened, with the value; a fix says what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
