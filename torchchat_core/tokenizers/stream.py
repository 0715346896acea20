"""Text out of token ids, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.base import text_bytes


class TextStream:
    """Decodes one sequence token by token.

    What has been pushed is the text of the tokens' bytes: a character whose bytes come in several tokens appears
    with the last of them, control tokens add nothing, and no space is lost. With `at_start` the space that the
    tokenizer puts before a text is taken off, and the parts together are `tokenizer.decode(ids)`; without it the
    sequence continues a text, and keeps its first space.

    This is exact for SentencePiece, tiktoken, and the decoders of tokenizer.json whose tokens do not change their
    neighbours' text: byte-level, byte fallback, Metaspace, WordPiece, none. `hugging_face` refuses other ones.
    """

    def __init__(self, tokenizer: Tokenizer, at_start: bool, shown: frozenset[int] = frozenset()) -> None:
        """`shown`: control tokens that add their names."""
        self._tokenizer = tokenizer
        self._control_ids = frozenset(tokenizer.special_tokens.values()) - shown
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix_is_due = at_start and tokenizer.adds_prefix_space

    def push(self, token: int) -> str:
        """The text that is complete with `token`; often none. Raises `TorchchatError` for a negative id."""
        return self._text(b"" if token in self._control_ids else text_bytes(self._tokenizer, token))

    def push_all(self, tokens: Iterable[int]) -> str:
        """The same for several tokens: what they give one by one."""
        return self._text(b"".join([text_bytes(self._tokenizer, token) for token in tokens
                                    if token not in self._control_ids]))

    def _text(self, data: bytes) -> str:
        if self._prefix_is_due and data:
            self._prefix_is_due = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD where the sequence ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
