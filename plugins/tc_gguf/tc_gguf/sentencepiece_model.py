"""SentencePiece's model file, which a vocabulary becomes to be read by the library, and from which it is written.

The format is protobuf's wire format of sentencepiece_model.proto: a number for field and type, then the value. Only
the few fields that matter here are known.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tc_gguf.vocabulary import BYTE, FIX, NORMAL, SENTENCEPIECE, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary
from torchchat_core.errors import TorchchatError
from torchchat_core.tokenizers.sentencepiece_file import SPACE

# Fields: of the whole, of a piece, of the trainer's and of the normaliser's part.
PIECE, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, SUFFIX_SPACE, BYTE_FALLBACK, UNKNOWN_PIECE, BOS_PIECE, EOS_PIECE, PADDING_PIECE = 3, 24, 35, 45, 46, 47, 48
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_EXTRA_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
UNIGRAM, BPE = 1, 2  # of MODEL_TYPE
NUMBER, TEXT, FLOAT = 0, 2, 5  # wire types


def model_file(vocabulary: Vocabulary, place: str) -> bytes:
    """The vocabulary as the content of a tokenizer.model.

    A precompiled map of characters is never written: llama.cpp leaves it out too. Raises `TorchchatError` where
    only some of the 256 bytes have tokens.
    """
    unknown = _unknown(vocabulary)
    byte_count = sum(kind == BYTE for kind in vocabulary.types)
    if byte_count not in (0, 256):
        raise TorchchatError(f"the vocabulary in {place} has tokens for {byte_count} of the 256 bytes", FIX)
    names = {BOS_PIECE: vocabulary.bos_id, EOS_PIECE: vocabulary.eos_id, PADDING_PIECE: vocabulary.padding_id,
             UNKNOWN_PIECE: unknown}
    trainer = _number(MODEL_TYPE, BPE) + _number(BYTE_FALLBACK, byte_count == 256)
    for place_of_name, token in names.items():  # the library takes the unknown token's name for "none"
        trainer += _text(place_of_name, vocabulary.tokens[unknown if token is None else token].encode())
    normalizer = b"".join([_text(1, b"identity"), _number(DUMMY_PREFIX, vocabulary.adds_space), _number(
        REMOVE_EXTRA_SPACES, vocabulary.removes_extra_spaces), _number(ESCAPE_SPACES, True)])
    return b"".join([_pieces(vocabulary, unknown), _text(TRAINER, trainer), _text(NORMALIZER, normalizer)])


def _unknown(vocabulary: Vocabulary) -> int:
    """The one token of the type unknown, which the library needs; where none or several have it, the file's choice."""
    of_type = [token for token, kind in enumerate(vocabulary.types) if kind == UNKNOWN]
    if len(of_type) == 1:
        return of_type[0]
    return vocabulary.unknown_id if vocabulary.unknown_id is not None else next(iter(of_type), 0)


def _pieces(vocabulary: Vocabulary, unknown: int) -> bytes:
    out = []
    known = set(vocabulary.tokens)
    score_of = struct.Struct("<f").pack
    for token, (text, kind, score) in enumerate(zip(vocabulary.tokens, vocabulary.types, vocabulary.scores,
                                                    strict=True)):
        wanted = UNKNOWN if token == unknown else UNUSED if kind == UNKNOWN else kind
        if kind == USER_DEFINED and " " in text and (escaped := text.replace(" ", SPACE)) not in known:
            text = escaped  # GGUF has these as they stand in a text, the library as they stand in a piece
            known.add(text)
        raw = text.encode()
        piece = b"\n" + _varint(len(raw)) + raw + b"\x15" + score_of(score) + b"\x18" + _varint(wanted)
        out.append(b"\n" + _varint(len(piece)) + piece)
    return b"".join(out)


def _varint(value: int) -> bytes:
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(place: int, value: int) -> bytes:
    return _varint(place << 3 | NUMBER) + _varint(int(value))


def _text(place: int, value: bytes) -> bytes:
    return _varint(place << 3 | TEXT) + _varint(len(value)) + value


# ---- the other direction ------------------------------------------------------------------------------------------


def vocabulary_of_model_file(content: bytes, place: str) -> Vocabulary:
    """The pieces in the content of a tokenizer.model. Which of them is BOS or EOS is left to others.

    Raises `TorchchatError` for a Unigram model, and for one that changes the characters of texts: readers of GGUF
    files do neither for this kind.
    """
    try:
        parts = list(_fields(content))
        pieces = [_piece(value) for key, value in parts if key == PIECE and isinstance(value, bytes)]
        trainer, normalizer = (dict(_fields(b"".join(value for key, value in parts if key == wanted and isinstance(
            value, bytes)))) for wanted in (TRAINER, NORMALIZER))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise TorchchatError(f"{place} is no SentencePiece model, or a damaged one",
                             "download or copy the model again") from error
    if trainer.get(MODEL_TYPE, UNIGRAM) != BPE or trainer.get(SUFFIX_SPACE):
        raise TorchchatError(f"{place} is a SentencePiece model of a kind that GGUF files do not have; they have BPE",
                             "use the converter of llama.cpp")
    if normalizer.get(CHARACTER_MAP):
        raise TorchchatError(f"{place} changes the characters of texts before it encodes them, which readers of GGUF "
                             "files do not do", "use the converter of llama.cpp")
    tokens, scores, types = zip(*pieces, strict=True) if pieces else ((), (), ())
    return Vocabulary(kind=SENTENCEPIECE, tokens=tokens, types=types, scores=scores,
                      unknown_id=types.index(UNKNOWN) if UNKNOWN in types else None,
                      removes_extra_spaces=bool(normalizer.get(REMOVE_EXTRA_SPACES, True)))


def _piece(content: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(content))
    text, score, kind = fields.get(PIECE_TEXT, b""), fields.get(PIECE_SCORE, 0.0), fields.get(PIECE_TYPE, NORMAL)
    if not (isinstance(text, bytes) and isinstance(score, float) and isinstance(kind, int)):
        raise IndexError  # as where the message ends too early: the fields are not what they have to be
    name = text.decode()
    return name.replace(SPACE, " ") if kind == USER_DEFINED else name, score, kind


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a message with their values. Raises `IndexError` or `struct.error` where it ends too early."""
    position = 0
    while position < len(content):
        key, position = _read_varint(content, position)
        kind = key & 7
        if kind == NUMBER:
            number, position = _read_varint(content, position)
            yield key >> 3, number
        elif kind == FLOAT:
            yield key >> 3, struct.unpack_from("<f", content, position)[0]
            position += 4
        else:
            length, position = _read_varint(content, position) if kind == TEXT else (8, position)
            if position + length > len(content):
                raise IndexError
            yield key >> 3, content[position : position + length]
            position += length


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
