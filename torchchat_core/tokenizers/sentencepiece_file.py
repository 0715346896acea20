"""SentencePiece models: Llama 2, Mistral, Gemma, llama2.c's small ones."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import read_file
from torchchat_core.tokenizers.base import UNKNOWN, ByteTokenizer, well_formed
from torchchat_core.tokenizers.declared import (
    SETTINGS,
    added_tokens,
    declared_tokens,
    legacy_added_tokens,
    merged_settings,
    token_name,
    with_control_tokens,
)
from torchchat_core.tokenizers.faults import named_faults
from torchchat_core.tokenizers.slicing import SLICE, slices
from torchchat_core.tokenizers.words import Words

# Text that normalizers make shorter: runs of white space, control and zero-width characters, ligatures, accents.
SHORTENED = "a  b \t\n\x07\x7f\u200b\ufeff e\u0301 \ufb01 \uff21 \u3000 \u1112\u1161\u11ab  c  "
SPACE = "\u2581"  # stands for a space inside pieces
# Characters stripped next to tokens declared with "lstrip" or "rstrip": Unicode's property White_Space.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
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

        Tokens that `settings`, added_tokens.json and special_tokens_map.json next to the file declare are honored.
        """
        return self._read(path, read_file(path), settings)

    def standalone(self, path: Path, settings: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Return the tokenizer as files that need no others, by name. Raises `TorchchatError` as `read` does."""
        content = read_file(path)
        settings = merged_settings(path, settings)
        special = self._read(path, content, settings).special_tokens
        control = {text: token for token, text in legacy_added_tokens(path).items()} | dict(special)
        whole = with_control_tokens(settings, control)
        return {path.name: content, SETTINGS: json.dumps(whole, ensure_ascii=False).encode()}

    def _read(self, path: Path, content: bytes, settings: Mapping[str, Any]) -> SentencePieceTokenizer:
        settings = merged_settings(path, settings)
        legacy = {token: (text, True) for token, text in legacy_added_tokens(path).items()}
        return sentencepiece_tokenizer(content, str(path), {**legacy, **added_tokens(settings)}, settings)


def sentencepiece_tokenizer(content: bytes, place: str, added: Mapping[int, tuple[str, bool]],
                         settings: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer that `content` is, a model in SentencePiece's wire format; `place` says in messages where that is.

    `added` are tokens beside those of the model: id -> (text, whether it is a control token). Raises `TorchchatError`
    where the content is damaged.
    """
    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=content)
        without_prefix = sentencepiece.SentencePieceProcessor(model_proto=content + NO_PREFIX)
        return SentencePieceTokenizer(library, without_prefix, added, settings, place)
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
                 added: Mapping[int, tuple[str, bool]], settings: Mapping[str, Any], place: str) -> None:
        self._problem = f"the tokenizer in {place} fails"
        self._bytes = _table_of_bytes(library)
        self._size = len(self._bytes)
        control = {library.id_to_piece(token): token for token in range(self._size) if library.is_control(token)}
        unknown = int(library.unk_id())
        control.update((text, token) for token, (text, special) in added.items() if special and token != unknown)
        self._added = {token: text for token, (text, _) in added.items() if token >= self._size}
        control.update(self._named(library, settings, {text: token for token, text in self._added.items()}, control))
        self._added |= {token: text for text, token in control.items() if token >= self._size}
        texts = {text: token for token, (text, special) in added.items()
                 if not special and token != unknown and text and text not in control}

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
        self.text_tokens = texts
        self._strips_left, self._strips_right = (
            {self._words[each.content] for each in declared_tokens(settings)
             if each.flags.get(flag) and each.content in self._words} for flag in ("lstrip", "rstrip"))
        self._at_all = Words(self._words)
        self._at_texts = Words(texts)
        # Some models declare control tokens as pieces that the library finds in any text.
        self._found_by_library = Words(text for text, token in control.items()
                                          if token < self._size and not library.is_control(token))
        self._without_prefix = without_prefix
        self._with_prefix = without_prefix if settings.get("add_prefix_space") is False else library
        self._prefix_after_control = settings.get("legacy") is True
        self.adds_prefix_space = b"".join(map(self.token_bytes, self.encode("a"))).startswith(b" ")
        self.longest_token = self._longest_token()

    def _longest_token(self) -> int | None:
        """Return the maximum number of text bytes that one token stands for.

        Returns None if there is no bound, because text may be unknown or normalization shortens it.
        """
        bytes_known = sum(map(self._without_prefix.is_byte, range(self._size))) == 256
        kept = b"".join(map(self.token_bytes, self._without_prefix.encode(SHORTENED))) == SHORTENED.encode()
        if not bytes_known or not kept or self._strips_left or self._strips_right:
            return None
        return max(map(len, (*self._bytes, *self._names.values(), *(text.encode() for text in self._added.values()))))

    def _named(self, library: sentencepiece.SentencePieceProcessor, settings: Mapping[str, Any],
               added: Mapping[str, int], known: Collection[str]) -> dict[str, int]:
        """Return text -> id of the control tokens that `settings` declare without ids.

        A token in a list that the vocabulary lacks gets the next id, as in `transformers`. Of the named tokens, only
        BOS and EOS are used, because a padding token may be an ordinary piece.
        """
        found: dict[str, int] = {}
        ends = [name for key in ("bos_token", "eos_token") if (name := token_name(settings, key))]
        listed = [each.content for each in declared_tokens(settings) if each.token is None and not each.by_name_alone]
        for text in dict.fromkeys(text for text in (*ends, *listed) if text not in known):
            token = added.get(text, library.piece_to_id(text))
            if token == library.unk_id():
                if text not in listed or text == library.id_to_piece(token):
                    continue
                token = max([self._size - 1, *added.values(), *found.values()]) + 1
            found[text] = token
        return found

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._encode((self._at_all if special else self._at_texts).split(well_formed(text)))

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        return self._encode(self._split(parts))

    def _split(self, parts: Sequence[str | int]) -> list[tuple[str | int, bool]]:
        split: list[tuple[str | int, bool]] = []
        for part in parts:
            split += [(part, True)] if isinstance(part, int) else self._at_texts.split(well_formed(part))
        return split

    def encode_slices(self, text: str | Sequence[str | int], *, special: bool = False) -> Iterator[Sequence[int]]:
        if isinstance(text, str):
            yield from self._slices((self._at_all if special else self._at_texts).split(well_formed(text)))
        else:
            yield from self._slices(self._split(text))

    def _encode(self, parts: Sequence[tuple[str | int, bool]]) -> list[int]:
        return list(itertools.chain.from_iterable(self._slices(parts, sliced=False)))

    def _slices(self, parts: Sequence[tuple[str | int, bool]], sliced: bool = True) -> Iterator[Sequence[int]]:
        """Yield the ids of `parts`: texts, and tokens given as ids or as texts in `_words`."""
        found = [self._words[part] if is_token and isinstance(part, str) else part for part, is_token in parts]
        prefix = True
        for part, before, after in zip(found, [None, *found], [*found[1:], None], strict=False):
            if isinstance(part, int):
                yield [part]
                prefix = self._prefix_after_control or part == self.bos_id
                continue
            text = part.lstrip(WHITE_SPACE) if before in self._strips_right else part
            text = text.rstrip(WHITE_SPACE) if after in self._strips_left else text
            for segment, library in self._segments(text, prefix) if text else ():
                if sliced and len(segment) > SLICE:
                    yield from slices(segment, functools.partial(self._with_starts, library))
                else:
                    with named_faults(self._problem):
                        yield library.encode(segment)

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        if token in self._names:
            return self._names[token]
        if token >= self._size:
            return self._added[token].encode() if token in self._added else UNKNOWN
        return self._bytes[token]

    def _segments(self, text: str, prefix: bool) -> Iterator[tuple[str, sentencepiece.SentencePieceProcessor]]:
        """Yield the segments of a text in which the library finds no control token, each with its encoder."""
        segments = [""]
        for part, is_control in self._found_by_library.split(text):
            if is_control:  # cut after the first character, so that the library does not see the whole
                segments[-1] += part[0]
                segments.append(part[1:])
            else:
                segments[-1] += part
        yield segments[0], self._with_prefix if prefix else self._without_prefix
        for segment in segments[1:]:
            yield segment, self._without_prefix

    def _with_starts(self, library: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text`, and the index of the character where each token starts."""
        encode = getattr(library, "encode_as_immutable_proto", None) or library.encode_as_proto  # of earlier versions
        with named_faults(self._problem):
            pieces = encode(text).pieces
        ids, starts = [piece.id for piece in pieces], [piece.begin for piece in pieces]
        if len(text) < max((piece.end for piece in pieces), default=0):  # these are byte offsets
            characters = {offset: index for index, offset in enumerate(
                itertools.accumulate((len(character.encode()) for character in text), initial=0))}
            starts = [characters[start] for start in starts]
        return ids, starts


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
