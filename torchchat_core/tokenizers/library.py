"""Wrap the tokenizers library in a class whose faults are all `TokenizerError`s that name the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tokenizers

from torchchat_core.tokenizers.faults import TokenizerError, captured_panics, named_faults

# A part of a regular expression: escaped, a class, flags, the beginning of a group, a repetition, or one character.
PATTERN_PART = re.compile(
    r"\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|\(\?[a-z-]+\)"
    r"|(?P<open>\((?:\?(?:[:=!>~|]|<[=!]|<\w+>|'\w+'|[a-z-]+:))?)|(?P<repeat>[*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)
FIXED_COUNT = re.compile(r"\{\d+\}")
AT_MOST_ONCE = frozenset(["?", "{0}", "{1}", "{,1}", "{0,1}", "{1,1}"])


class Library:
    """A `tokenizers.Tokenizer` made from the content of a tokenizer.json.

    The library raises plain `Exception`s, and if its Rust code panics, a `BaseException` that is not an `Exception`.
    Every method raises `TokenizerError` in both cases.
    """

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        """`place` is the name of the file in messages."""
        self._problem = f"the tokenizer in {place} fails"
        self.may_panic = any(map(takes_exponential_time, _regular_expressions(content)))
        with named_faults(f"{place} cannot be read", "the file is damaged, or made by a later version of tokenizers"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            decoder = self._tokenizer.decoder
        self._decode_pieces: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of `text` without the tokens that the file adds around it. Not thread-safe."""
        with captured_panics() if self.may_panic else nullcontext(), self._named():
            self._tokenizer.encode_special_tokens = not special
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_starts(self, text: str, *, special: bool) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, and the index of the character where each token starts."""
        with captured_panics() if self.may_panic else nullcontext(), self._named():
            self._tokenizer.encode_special_tokens = not special
            found = self._tokenizer.encode(text, add_special_tokens=False)
            return list(found.ids), [start for start, _ in found.offsets]

    def added_around(self) -> list[int]:
        """Return the ids that the file adds around an empty text."""
        with self._named("its post_processor may name a token that it does not have"):
            return list(self._tokenizer.encode("", add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens included."""
        with self._named():
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def decode_pieces(self, pieces: list[str]) -> str:
        """Return the text to which the file's decoder converts `pieces`."""
        with self._named():
            return str(self._decode_pieces(pieces))

    def token_to_id(self, text: str) -> int | None:
        with self._named():
            return self._tokenizer.token_to_id(text)

    def id_to_token(self, token: int) -> str | None:
        with self._named():
            return self._tokenizer.id_to_token(token)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every piece, added tokens included."""
        with self._named():
            return self._tokenizer.get_vocab(with_added_tokens=True)

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        with self._named():
            return self._tokenizer.get_added_tokens_decoder()

    def add_aliases(self, names: Mapping[int, str]) -> dict[int, int]:
        """Add a token for each name, with the white space handling of the token with that id. Returns the new ids."""
        added = self.added_tokens()
        with self._named():
            self._tokenizer.add_tokens([
                tokenizers.AddedToken(name, lstrip=added[token].lstrip, rstrip=added[token].rstrip, normalized=False,
                                      special=False) for token, name in names.items()])
            found = {token: self._tokenizer.token_to_id(name) for token, name in names.items()}
        return {token: alias for token, alias in found.items() if alias is not None}

    def too_slow(self) -> TokenizerError:
        """Return the error for a text on which the file's regular expressions take too long."""
        return TokenizerError(f"{self._problem}: its regular expressions take too long for this text",
                              "choose another model, or shorten the text")

    def _named(self, fix: str | None = None) -> AbstractContextManager[None]:
        return named_faults(self._problem, fix)


def _regular_expressions(content: Any) -> Iterator[str]:
    """Yield every pattern in the JSON of a tokenizer, except where its model (a large vocabulary) is."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            if isinstance(part.get("Regex"), str):
                yield part["Regex"]
            parts += [value for key, value in part.items() if key not in ("model", "added_tokens")]
        elif isinstance(part, list):
            parts += part


def takes_exponential_time(pattern: str) -> bool:
    """Return True if the regular expression repeats a group that can match a text in several ways.

    Matching such patterns, for example `(a+)+$` and `(a|aa)+$`, can take time that doubles with each character.
    """
    groups = [False]  # for each open group: True if it contains an alternative or a variable repetition
    closed = False  # the same for the group that was just closed
    for part in PATTERN_PART.finditer(pattern):
        if part["open"]:
            groups.append(False)
        elif part[0] == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] = groups[-1] or closed
            continue
        elif part["repeat"]:
            if closed and part["repeat"] not in AT_MOST_ONCE:
                return True
            groups[-1] = groups[-1] or not FIXED_COUNT.fullmatch(part["repeat"])
        elif part[0] == "|":
            groups[-1] = True
        closed = False
    return False
