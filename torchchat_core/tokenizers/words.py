"""Find words in a text. The words are control tokens, of which a vocabulary may have hundreds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

WINDOW = 1 << 16  # characters searched before other threads can run


class Words:
    """A set of words to search for. If several words match at one position, the longest is found.

    The time of a search does not depend on the number of words. Long texts are searched in parts, because Python's
    regular expressions block all other threads.
    """

    def __init__(self, words: Iterable[str]) -> None:
        listed = sorted({word for word in words if word})
        self._longest = max(map(len, listed), default=0)
        self._pattern = re.compile(_tree(listed)) if listed else None

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Yield the matches in `text`, from left to right."""
        if self._pattern is None:
            return
        start = 0
        while start < len(text):
            end = min(start + WINDOW, len(text))
            found = self._pattern.search(text, start, min(end + self._longest, len(text)))
            if found is None or found.start() >= end:
                start = end
            else:
                yield found
                start = found.end()

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the nonempty parts of `text` as (part, is word)."""
        start = 0
        for found in self.find(text):
            if found.start() > start:
                yield text[start : found.start()], False
            yield found[0], True
            start = found.end()
        if start < len(text):
            yield text[start:] if start else text, False

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Return `parts` as a list."""
        return list(self.parts(text))

    def replace(self, text: str, replacement: Callable[[str], str]) -> str:
        """Return `text` with each of the words replaced."""
        if next(self.find(text), None) is None:
            return text
        return "".join(replacement(part) if is_word else part for part, is_word in self.parts(text))

    def starts(self, text: str) -> bool:
        """Return True if `text` starts with one of the words."""
        return self._pattern is not None and self._pattern.match(text) is not None


def _tree(words: list[str]) -> str:
    """Return a pattern that matches the longest of the sorted, distinct `words` without trying them one by one."""
    optional = words[:1] == [""]
    words = words[optional:]
    if not words:
        return ""
    shared = 0
    while words[0][: shared + 1] == words[-1][: shared + 1] and shared < len(words[0]):
        shared += 1
    if shared:
        inner = re.escape(words[0][:shared]) + _tree([word[shared:] for word in words])
    else:
        groups: dict[str, list[str]] = {}
        for word in words:
            groups.setdefault(word[0], []).append(word[1:])
        inner = "|".join(re.escape(first) + _tree(rest) for first, rest in groups.items())
    return f"(?:{inner})?" if optional else f"(?:{inner})"
