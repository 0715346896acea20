"""What the tokenizers share: decoding by bytes, splitting at control tokens, and the names in their settings."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchchat_core.errors import TorchchatError

# What an id without a token adds to a text: models pad their vocabularies, and sampling may draw such an id.
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
TOKEN_ID = re.compile(r"[0-9]{1,9}")


class ByteTokenizer(ABC):
    """A `specs.Tokenizer` whose text is that of its tokens' bytes, one after the other.

    Subclasses say what the bytes of a token are, and so decoding a whole sequence and decoding it token by token
    (`stream.TextStream`) cannot differ.
    """

    adds_prefix_space: bool = False
    end_ids: frozenset[int] = frozenset()
    chat_template: str | Sequence[Mapping[str, str]] | None = None

    def __init__(self, *, vocab_size: int, special_tokens: Mapping[str, int], bos_id: int | None, eos_id: int | None,
                 adds_bos: bool) -> None:
        self.vocab_size = vocab_size
        self.special_tokens: Mapping[str, int] = dict(special_tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos and bos_id is not None
        self._control_ids = frozenset(self.special_tokens.values())

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without BOS or EOS. With `special`, the texts of control tokens become their ids."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text; for control tokens the UTF-8 of their name.

        Raises `TorchchatError` for an id outside the vocabulary.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence; control tokens are left out, bytes that are no UTF-8 become U+FFFD.

        So does an id from `vocab_size` on. Raises `TorchchatError` for a negative id.
        """
        data = b"".join(text_bytes(self, token) for token in ids if token not in self._control_ids)
        if self.adds_prefix_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise TorchchatError(f"token id {token} is outside the vocabulary, which has 0 to {self.vocab_size - 1}")


def text_bytes(tokenizer: Any, token: int) -> bytes:
    """`tokenizer.token_bytes(token)`, with U+FFFD for ids beyond the vocabulary."""
    return UNKNOWN if token >= tokenizer.vocab_size else bytes(tokenizer.token_bytes(token))


class Splitter:
    """Cuts text at the given words. Of words that begin alike, the longest is taken."""

    def __init__(self, words: Iterable[str]) -> None:
        longest_first = sorted((word for word in words if word), key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The parts of `text` that are not empty, each with whether it is one of the words."""
        if self._pattern is None:
            return [(text, False)] if text else []
        parts = self._pattern.split(text)  # text, word, text, word, ..., text
        return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]


def well_formed(text: str) -> str:
    """`text` with each surrogate that has no partner replaced by U+FFFD: none of the libraries takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def token_name(settings: Mapping[str, Any], key: str) -> str | None:
    """The token text under `key` ("bos_token", ...), which is a string or an object with "content"; else None."""
    value = settings.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def added_tokens(settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id -> (text, whether it is a control token) of tokenizer_config.json's added_tokens_decoder.

    Raises `TorchchatError` where an entry is malformed.
    """
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping):
        raise TorchchatError(f"added_tokens_decoder is {declared!r:.60}; it has to be an object",
                             "mend tokenizer_config.json, or download the model again")
    found = {}
    for key, value in declared.items():
        content = value.get("content") if isinstance(value, Mapping) else None
        if not TOKEN_ID.fullmatch(str(key)) or not isinstance(content, str):
            raise TorchchatError(f"added_tokens_decoder has {key!r:.40}: {value!r:.60}; it maps token ids to objects "
                                 "with \"content\"", "mend tokenizer_config.json, or download the model again")
        found[int(key)] = (content, bool(value.get("special", False)))
    return found
