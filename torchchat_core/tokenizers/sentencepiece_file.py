"""SentencePiece models: Llama 2, Mistral, Gemma, llama2.c's small ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import read_file, read_json
from torchchat_core.tokenizers.base import UNKNOWN, ByteTokenizer, Splitter, added_tokens, token_name, well_formed

SPACE = "\u2581"  # stands for a space inside pieces
# In the wire format, fields that come later override those before: normalizer_spec.add_dummy_prefix = false.
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceReader:
    """A `specs.TokenizerReader`."""

    def accepts(self, path: Path) -> bool:
        """Whether the file begins as a model does: with a piece (field 1) that begins with its text (field 1)."""
        with path.open("rb") as file:
            head = file.read(3)
        return head[:1] == b"\n" and head[2:] == b"\n"

    def read(self, path: Path, settings: Mapping[str, Any]) -> SentencePieceTokenizer:
        """The tokenizer of the file. Raises `TorchchatError` where the file is damaged.

        Tokens that `settings` (added_tokens_decoder) or an added_tokens.json beside the file add are honoured.
        """
        added = {**_legacy_added_tokens(path), **added_tokens(settings)}
        return sentencepiece_tokenizer(read_file(path), str(path), added, settings)


def sentencepiece_tokenizer(content: bytes, place: str, added: Mapping[int, tuple[str, bool]],
                         settings: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer that `content` is, a model in SentencePiece's wire format; `place` says in messages where that is.

    `added` are tokens beside those of the model: id -> (text, whether it is a control token). Raises `TorchchatError`
    where the content is damaged.
    """
    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=content)
        without_prefix = sentencepiece.SentencePieceProcessor(model_proto=content + NO_PREFIX)
        return SentencePieceTokenizer(library, without_prefix, added, settings)
    except (RuntimeError, ValueError) as error:  # pieces that are no UTF-8 among them
        raise TorchchatError(f"{place} is no SentencePiece model, or a damaged one",
                             "download or copy the model again") from error


class SentencePieceTokenizer(ByteTokenizer):
    """The pieces of a model file, and the tokens that were added to them.

    Added tokens are control tokens where their entry says so, and else stand for their text. In `encode`, a space
    is put before the text's beginning and before text after BOS, as Llama 2's reference does; after other control
    tokens only where the settings say "legacy": true, as `transformers` does.
    """

    def __init__(self, library: sentencepiece.SentencePieceProcessor,
                 without_prefix: sentencepiece.SentencePieceProcessor,
                 added: Mapping[int, tuple[str, bool]], settings: Mapping[str, Any]) -> None:
        self._bytes = _table_of_bytes(library)
        self._size = len(self._bytes)
        control = {library.id_to_piece(token): token for token in range(self._size) if library.is_control(token)}
        unknown = int(library.unk_id())
        control.update((text, token) for token, (text, special) in added.items() if special and token != unknown)
        self._added = {token: text for token, (text, _) in added.items() if token >= self._size}
        texts = {text: token for token, text in self._added.items() if text not in control}

        bos, eos = token_name(settings, "bos_token"), token_name(settings, "eos_token")
        adds_bos = settings.get("add_bos_token")
        super().__init__(
            vocab_size=max(self._added, default=self._size - 1) + 1,
            special_tokens=control,
            bos_id=control.get(bos or "", _known(library.bos_id())),
            eos_id=control.get(eos or "", _known(library.eos_id())),
            adds_bos=True if adds_bos is None else bool(adds_bos),
        )
        self._names = {token: text.encode() for text, token in control.items()}
        self._words = {**control, **texts}
        self._at_all = Splitter(self._words)
        self._at_texts = Splitter(texts)
        # Some models declare control tokens as pieces that the library finds in any text.
        self._found_by_library = Splitter(text for text, token in control.items()
                                          if token < self._size and not library.is_control(token))
        self._without_prefix = without_prefix
        self._with_prefix = without_prefix if settings.get("add_prefix_space") is False else library
        self._prefix_after_control = settings.get("legacy") is True
        self.adds_prefix_space = b"".join(map(self.token_bytes, self.encode("a"))).startswith(b" ")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        splitter = self._at_all if special else self._at_texts
        ids: list[int] = []
        prefix = True
        for part, is_token in splitter.split(well_formed(text)):
            if is_token:
                ids.append(self._words[part])
                prefix = self._prefix_after_control or ids[-1] == self.bos_id
            else:
                ids += self._encode_ordinary(part, prefix)
        return ids

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        if token in self._names:
            return self._names[token]
        if token >= self._size:
            return self._added[token].encode() if token in self._added else UNKNOWN
        return self._bytes[token]

    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        """Ids of text in which nothing is a control token, whatever the library takes it for."""
        segments = [""]
        for part, is_control in self._found_by_library.split(text):
            if is_control:  # cut after the first character, so that the library does not see the whole
                segments[-1] += part[0]
                segments.append(part[1:])
            else:
                segments[-1] += part
        ids: list[int] = (self._with_prefix if prefix else self._without_prefix).encode(segments[0])
        for segment in segments[1:]:
            ids += self._without_prefix.encode(segment)
        return ids


def _table_of_bytes(library: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """The bytes of every piece. Raises `ValueError` where a piece is no text."""
    def of(token: int) -> bytes:
        if library.is_unknown(token):
            return str(library.decode([token])).encode()
        piece = str(library.id_to_piece(token))
        if library.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode()

    return [of(token) for token in range(library.get_piece_size())]


def _known(token: int) -> int | None:
    return token if token >= 0 else None  # the library says -1 for "none"


def _legacy_added_tokens(path: Path) -> dict[int, tuple[str, bool]]:
    """The control tokens of added_tokens.json (text -> id), where older models have it beside the model file."""
    beside = path.parent / "added_tokens.json"
    if not beside.is_file():
        return {}
    found = {}
    for text, token in read_json(beside).items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 1_000_000_000:
            raise TorchchatError(f"{beside} has {text!r:.40}: {token!r:.40}; it maps texts to token ids")
        found[token] = (text, True)
    return found
