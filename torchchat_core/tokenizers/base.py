"""What the tokenizers share: decoding by bytes, splitting at control tokens, and the names in their settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchchat_core.errors import TorchchatError

# What an id without a token adds to a text: models pad their vocabularies, and sampling may draw such an id.
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class ByteTokenizer(ABC):
    """A `specs.Tokenizer` whose text is that of its tokens' bytes, one after the other.

    Subclasses say what the bytes of a token are, and so decoding a whole sequence and decoding it token by token
    (`stream.TextStream`) cannot differ.
    """

    adds_prefix_space: bool = False
    end_ids: frozenset[int] = frozenset()
    chat_template: str | Sequence[Mapping[str, str]] | None = None
    longest_token: int | None = None  # maximum number of text bytes that one token stands for; None if unbounded
    text_tokens: Mapping[str, int] = {}  # text -> id of added tokens that are not control tokens and occur in any text

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

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of a text given in parts: ordinary text, and control tokens as their ids.

        The result is that of `encode(text, special=True)` for the whole text, except that names of control tokens
        within the parts are ordinary text. This implementation is for tokenizers that encode parts independently.
        """
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.encode(part)
        return ids

    def encode_slices(self, text: str | Sequence[str | int], *, special: bool = False) -> Iterator[Sequence[int]]:
        """Yield the ids of `encode(text, special=special)`, or of `encode_parts(text)`, in slices.

        Tokenizers that encode a long text in slices need memory for only one slice at a time.
        """
        yield self.encode(text, special=special) if isinstance(text, str) else self.encode_parts(text)

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


def well_formed(text: str) -> str:
    """`text` with each surrogate that has no partner replaced by U+FFFD: none of the libraries takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
