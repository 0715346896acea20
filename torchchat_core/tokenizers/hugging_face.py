"""tokenizer.json, read by the tokenizers library."""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.tokenizers.base import UNKNOWN, ByteTokenizer, well_formed
from torchchat_core.tokenizers.declared import SETTINGS, token_name
from torchchat_core.tokenizers.faults import captured_panics
from torchchat_core.tokenizers.lengths import check_growth, longest_token
from torchchat_core.tokenizers.library import Library
from torchchat_core.tokenizers.slicing import slices
from torchchat_core.tokenizers.whole_json import TOKEN_NAMES, whole_content

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Decoders that give a token the same text whatever follows it, so that text can be streamed.
STEADY_DECODERS = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})
MAX_SECONDS = 10.0  # for one text if a regular expression may take exponential time
SMALL_SLICES = (512, 64)  # size and edge of slices, in characters, in that case
ANCHOR = "a"  # a token before the one in question, which is then not at the start


class HuggingFaceReader:
    """A `specs.TokenizerReader`."""

    def accepts(self, path: Path) -> bool:
        """Any file whose name matched: tokenizer.json is of one kind only, and damage is better named by `read`."""
        return path.is_file()

    def read(self, path: Path, settings: Mapping[str, Any]) -> HuggingFaceTokenizer:
        """The tokenizer of the file. Raises `TorchchatError` where the file is damaged, or where its decoder does
        not work token by token.

        Tokens declared in `settings`, and in special_tokens_map.json and added_tokens.json next to the file, are
        treated as if the file listed them. They also name BOS and EOS; without them, BOS is the token that the file
        puts before a text.
        """
        content, settings = whole_content(path, settings)
        return hugging_face_tokenizer(content, str(path), settings)

    def standalone(self, path: Path, settings: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Return the tokenizer as files that need no others, by name. Raises `TorchchatError` as `read` does."""
        content, settings = whole_content(path, settings)
        return {name: json.dumps(value, ensure_ascii=False).encode()
                for name, value in ((path.name, content), (SETTINGS, settings))}


def hugging_face_tokenizer(content: Mapping[str, Any], place: str, settings: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer that `content` is, the object in a tokenizer.json; `place` says in messages where that is.

    Raises `TorchchatError` where the content is damaged, or where its decoder does not work token by token.
    """
    if not isinstance(content.get("model"), dict):
        raise TorchchatError(f"{place} has no \"model\"", "it is not a tokenizer.json of the tokenizers library")
    check_growth(content, place)
    unknown = _unknown_token(content["model"])
    names = {key: token_name(settings, key) for key in TOKEN_NAMES}
    with captured_panics():
        library = Library(content, place)
        to_bytes = _piece_reader(place, library, content.get("decoder"))
        tokenizer = HuggingFaceTokenizer(library, to_bytes, names, unknown, settings.get("add_bos_token"))
        tokenizer.longest_token = longest_token(content, library.vocabulary(), byte_level_alphabet())
        return tokenizer


class HuggingFaceTokenizer(ByteTokenizer):
    """A tokenizer.json. Its post-processor, truncation and padding are left out of `encode`."""

    def __init__(self, library: Library, to_bytes: Callable[[str], bytes],
                 names: Mapping[str, str | None], unknown: str | None, adds_bos: bool | None) -> None:
        self._library = library
        self._to_bytes = to_bytes
        self._known_bytes: dict[int, bytes] = {}
        self._lock = threading.Lock()  # guards the library's switch for control tokens
        added = library.added_tokens()
        # The unknown token stands for text, so it is shown; a vocabulary may name a control token as its unknown one.
        named = {name for name in names.values() if name is not None}
        special_tokens = {token.content: number for number, token in added.items()
                          if token.special and (token.content != unknown or token.content in named)}
        self._texts = {number: token.content.encode() for number, token in added.items()
                       if token.content in special_tokens}
        in_front = library.added_around()
        bos = library.token_to_id(names["bos_token"]) if names["bos_token"] else None
        if bos is None and in_front and in_front[0] in special_tokens.values():
            bos = in_front[0]
        super().__init__(
            vocab_size=max(library.vocabulary().values(), default=-1) + 1,
            special_tokens=special_tokens,
            bos_id=bos,
            eos_id=library.token_to_id(names["eos_token"]) if names["eos_token"] else None,
            adds_bos=in_front[:1] == [bos] if adds_bos is None else bool(adds_bos),
        )
        self.text_tokens = {token.content: number for number, token in added.items()
                            if not token.special and token.content != unknown}
        self._aliases: dict[int, str] = {}  # of control tokens
        self._aliased: dict[int, int] = {}  # id of the alias -> id of the control token
        ids = self.encode("a")
        encoded_with_space = b"".join(map(self.token_bytes, ids)).startswith(b" ")
        self.adds_prefix_space = encoded_with_space and not library.decode(ids).startswith(" ")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        with self._lock:
            return self._library.encode(well_formed(text), special=special)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids as `ByteTokenizer.encode_parts` does.

        The library encodes the whole text. Aliases stand for the control tokens, so that their names are ordinary text.
        """
        text = self._with_aliases(parts)
        with self._lock:
            ids = self._library.encode(text, special=False)
        return [self._aliased.get(token, token) for token in ids]

    def encode_slices(self, text: str | Sequence[str | int], *, special: bool = False) -> Iterator[Sequence[int]]:
        whole = well_formed(text) if isinstance(text, str) else self._with_aliases(text)
        special = special and isinstance(text, str)

        deadline = time.monotonic() + MAX_SECONDS if self._library.may_panic else math.inf

        def encode(part: str) -> tuple[list[int], list[int]]:
            if time.monotonic() > deadline:
                raise self._library.too_slow()
            with self._lock:
                return self._library.encode_with_starts(part, special=special)

        for ids in slices(whole, encode, *(SMALL_SLICES if self._library.may_panic else ())):
            yield ids if isinstance(text, str) else [self._aliased.get(token, token) for token in ids]

    def _with_aliases(self, parts: Sequence[str | int]) -> str:
        with self._lock:
            if not self._aliases:
                self._add_aliases()
        return "".join(self._aliases[part] if isinstance(part, int) else well_formed(part) for part in parts)

    def _add_aliases(self) -> None:
        """Add a token to the library for each control token, under a name that nobody can guess."""
        secret = secrets.token_hex(16)
        self._aliases = {token: f"<{secret}:{token}>" for token in self.special_tokens.values()}
        alias_ids = self._library.add_aliases(self._aliases)
        self._aliased = {alias: token for token, alias in alias_ids.items()}

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        if token not in self._known_bytes:
            self._known_bytes[token] = self._texts.get(token) or self._piece_bytes(token)
        return self._known_bytes[token]

    def _piece_bytes(self, token: int) -> bytes:
        piece = self._library.id_to_token(token)
        return UNKNOWN if piece is None else self._to_bytes(piece)


def byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies -> the byte.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return alphabet


def _piece_reader(place: str, library: Library, decoder: object) -> Callable[[str], bytes]:
    """What gives a piece's bytes in the middle of a text. Raises `TorchchatError` where a piece has no such bytes."""
    steps = list(_decoder_steps(decoder))
    types = {str(step.get("type")) for step in steps}
    if "ByteLevel" in types and types <= {"ByteLevel", "Fuse"}:
        return _byte_level_reader(library)
    unfit = types - STEADY_DECODERS
    if unfit or any(step.get("stop") for step in steps if step.get("type") == "Strip"):
        name = min(unfit, default="Strip at the end")
        raise TorchchatError(f"the decoder {quoted(name)} in {place} does not work token by token; known are ByteLevel "
                             f"alone, and {', '.join(sorted(STEADY_DECODERS))}")
    decode = library.decode_pieces
    before = decode([ANCHOR])
    with_byte_pieces = "ByteFallback" in types

    def to_bytes(piece: str) -> bytes:
        byte = BYTE_PIECE.fullmatch(piece) if with_byte_pieces else None
        if byte:
            return bytes([int(byte[1], 16)])
        return decode([ANCHOR, piece]).removeprefix(before).encode()

    return to_bytes


def _byte_level_reader(library: Library) -> Callable[[str], bytes]:
    alphabet = byte_level_alphabet()
    literal = {token.content for token in library.added_tokens().values()}

    def to_bytes(piece: str) -> bytes:
        if piece in literal or any(character not in alphabet for character in piece):
            return piece.encode()  # added tokens are written as the text that they are
        return bytes(alphabet[character] for character in piece)

    return to_bytes


def _decoder_steps(decoder: object) -> Iterator[dict[str, Any]]:
    """The decoder's steps, with sequences (one level, as the library writes them) laid out."""
    if isinstance(decoder, dict):
        parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
        for step in parts if isinstance(parts, list) else ():
            if isinstance(step, dict):
                yield step


def _unknown_token(model: dict[str, Any]) -> str | None:
    """The text of the token that stands for what has none: by name, or (Unigram) by place."""
    if isinstance(model.get("unk_token"), str):
        return str(model["unk_token"])
    vocabulary, place = model.get("vocab"), model.get("unk_id")
    if isinstance(vocabulary, list) and isinstance(place, int) and 0 <= place < len(vocabulary):
        entry = vocabulary[place]
        return entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else None
    return None

