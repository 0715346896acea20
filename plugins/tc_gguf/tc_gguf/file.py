"""What a GGUF file holds: metadata, and where each tensor lies. No tensor is read here.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. A file is hostile input: every count,
length, offset and type in it is checked against the file's size before anything is allocated, and arrays stay as
compact as they are stored, so that what is kept of a file takes no more than about four times its size in memory.
A vocabulary takes more once it is made of this: `vocabulary` limits how many tokens and merges there may be.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_gguf.values import GgufValue, Texts, shown
from torchchat_core.errors import TorchchatError, quoted, quoted_path

DAMAGED = "the file is damaged, incomplete or no GGUF file; fetch it again"
MAXIMUM_KEYS = 4096  # real files have fewer than a hundred
MAXIMUM_TENSORS = 16384  # real files have fewer than two thousand
MAXIMUM_NAME = 65535  # bytes of a key or a tensor's name
MAXIMUM_TEXT = 32 << 20  # bytes of one text; a whole tokenizer.json is the longest that is met
LONGEST_TEXT = 1 << 20  # bytes of a text that is decoded; longer ones, which nothing here reads, stay bytes
MAXIMUM_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorType:
    """How numbers of a type are stored: in blocks of `block_elements`, each of `block_bytes`."""

    name: str
    block_elements: int
    block_bytes: int


TYPES: Mapping[int, TensorType] = {
    number: TensorType(name, elements, size) for number, name, elements, size in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 36), (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
        (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17),
    )
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch has it; the file states it the other way round
    type: TensorType
    path: Path
    offset: int  # from the start of the file
    size: int  # in bytes


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file, or several that one model was split into. The methods look up metadata of a given type."""

    path: Path  # of the first, where there are several
    version: int
    alignment: int
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises `TorchchatError` where the key is missing and has no default, or holds something else."""
        value: int = self._value(key, default, int, "a whole number")
        if isinstance(value, bool):
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises `TorchchatError` as `integer` does."""
        value = self._value(key, default, int | float, "a number")
        if isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Raises `TorchchatError` as `integer` does."""
        value: bool = self._value(key, default, bool, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Raises `TorchchatError` as `integer` does, and where the text is longer than LONGEST_TEXT."""
        value: str = self._value(key, default, str, f"a text of at most {LONGEST_TEXT} bytes")
        return value

    def texts(self, key: str, default: Texts | None = None) -> Texts:
        """Raises `TorchchatError` as `integer` does."""
        value: Texts = self._value(key, default, Texts, "a list of texts")
        return value

    def integers(self, key: str) -> array[int]:
        """Raises `TorchchatError` as `integer` does."""
        value: array[int] = self._value(key, None, array, "a list of whole numbers")
        if value.typecode in "fd":
            raise self._wrong(key, value, "a list of whole numbers")
        return value

    def numbers(self, key: str) -> array[float]:
        """Raises `TorchchatError` as `integer` does. The numbers need not be finite."""
        value: array[float] = self._value(key, None, array, "a list of numbers")
        return value

    def _value(self, key: str, default: Any, kind: Any, called: str) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise TorchchatError(f"{self.path.name} has no {quoted(key)}", DAMAGED)
        if not isinstance(value, kind):
            raise self._wrong(key, value, called)
        return value

    def _wrong(self, key: str, value: object, called: str) -> TorchchatError:
        return TorchchatError(f"{key} is {shown(value)} in {self.path.name}; it has to be {called}", DAMAGED)


def read_split(paths: Sequence[Path]) -> GgufFile:
    """The model in one file, or in all the files that it was split into, in their order.

    Metadata are those of the first; what names the model has to be the same where others have it too. Raises
    `TorchchatError` where a file cannot be read, or does not belong there.
    """
    files = [read_gguf(path) for path in paths]
    first = files[0]
    if len(files) == 1 and first.integer("split.count", 1) <= 1:
        return first
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        _check_shard(file, number, len(files))
        _check_same_model(first, file)
        twice = tensors.keys() & file.tensors.keys()
        if twice:
            raise TorchchatError(f"{quoted(min(twice))} is in two of the files of {first.path.name}",
                                 "they belong to different models; fetch all of them again")
        tensors |= file.tensors
    wanted = first.integer("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise TorchchatError(f"{first.path.name} and the files that go with it hold {len(tensors)} tensors; its "
                             f"split.tensors.count is {wanted}", "fetch all of them again")
    return GgufFile(first.path, first.version, first.alignment, first.metadata, tensors)


def _check_shard(file: GgufFile, number: int, count: int) -> None:
    if "split.count" not in file.metadata:
        raise TorchchatError(f"{file.path.name} is named like a part of a model, but holds no split.count",
                             "a file that is a whole model must not have a name like NAME-00001-of-00002.gguf")
    stated = file.integer("split.no"), file.integer("split.count")
    if stated != (number, count):
        raise TorchchatError(f"{file.path.name} is part {stated[0] + 1} of {stated[1]}; part {number + 1} of {count} "
                             "was expected", "keep all parts in one folder, under the names NAME-00001-of-00002.gguf "
                             "and so on that they were published with")


def _check_same_model(first: GgufFile, file: GgufFile) -> None:
    for key in ("general.architecture", "general.name"):
        stated = file.metadata.get(key, first.metadata.get(key))
        if stated != first.metadata.get(key):
            raise TorchchatError(f"{key} is {shown(stated)} in {file.path.name}, and "
                                 f"{shown(first.metadata.get(key))} in {first.path.name}",
                                 "they belong to different models; fetch all of them again")


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor descriptions of one file.

    Raises `TorchchatError` for a file that is missing, damaged or of another kind.
    """
    if sys.byteorder != "little":
        raise TorchchatError("GGUF files cannot be read on this machine, which stores numbers big-endian")
    try:
        if not path.is_file():
            raise TorchchatError(f"{quoted_path(str(path))} is no file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise TorchchatError(f"{path.name} is too short for a GGUF file", DAMAGED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
                return _Parser(path, mapping).file()
    except (OSError, ValueError) as error:  # ValueError: the file became empty meanwhile
        raise TorchchatError(f"cannot read {quoted_path(str(path))}: {getattr(error, 'strerror', None) or error}"
                             ) from None


class _Parser:
    """Reads one mapped file from its start to where the tensors begin."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.size = len(mapping)
        self.position = 0

    def file(self) -> GgufFile:
        version = self._version()
        tensor_count = self._count("tensors", self._unpack(_UINT64, "the number of tensors"), 33, MAXIMUM_TENSORS)
        key_count = self._count("metadata keys", self._unpack(_UINT64, "the number of keys"), 13, MAXIMUM_KEYS)
        metadata: dict[str, GgufValue] = {}
        for _ in range(key_count):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._error(f"holds the metadata key {quoted(key)} twice")
            metadata[key] = self._value(key, self._unpack(_UINT32, f"the type of {quoted(key)}"))
        alignment = self._alignment(metadata.get("general.alignment", 32))
        described = [self._tensor() for _ in range(tensor_count)]
        tensors = self._placed(described, alignment)
        return GgufFile(self.path, version, alignment, metadata, tensors)

    def _version(self) -> int:
        magic, version = self.mapping[:4], int.from_bytes(self.mapping[4:8], "little")
        if magic != b"GGUF":
            kind = "an old format of llama.cpp" if magic in (b"lmgg", b"fmgg", b"tjgg", b"algg") else "no GGUF file"
            raise TorchchatError(f"{self.path.name} is {kind}: it starts with {quoted(magic)}",
                                 "fetch a GGUF file of the model, or convert it with llama.cpp")
        if int.from_bytes(self.mapping[4:8], "big") in (2, 3):
            raise TorchchatError(f"{self.path.name} is a big-endian GGUF file, which torchchat does not read",
                                 "fetch the little-endian file of the model")
        if version not in (2, 3):
            raise TorchchatError(f"{self.path.name} is of GGUF version {version}; versions 2 and 3 are read",
                                 "fetch a newer file of the model" if version == 1 else DAMAGED)
        self.position = 8
        return version

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _error(self, what: str, fix: str = DAMAGED) -> TorchchatError:
        return TorchchatError(f"{self.path.name} {what}", fix)

    def _take(self, count: int, what: str) -> int:
        """The position before, having gone `count` bytes on."""
        start = self.position
        if count > self.size - start:
            raise self._error(f"ends within {what}: {count} bytes are needed at {start}, and it has {self.size}")
        self.position = start + count
        return start

    def _unpack(self, form: struct.Struct, what: str) -> Any:
        return form.unpack_from(self.mapping, self._take(form.size, what))[0]

    def _count(self, called: str, count: int, smallest: int, maximum: int | None = None) -> int:
        """A number of things of at least `smallest` bytes each, checked against the bytes that are left."""
        if count * smallest > self.size - self.position:
            raise self._error(f"states {count} {called}, more than its {self.size} bytes can hold")
        if maximum is not None and count > maximum:
            raise self._error(f"states {count} {called}; at most {maximum} are read")
        return count

    def _bytes(self, what: str, maximum: int) -> bytes:
        length = self._unpack(_UINT64, f"the length of {what}")
        if length > maximum:
            raise self._error(f"states {length} bytes for {what}; at most {maximum} are read")
        start = self._take(length, what)
        return self.mapping[start : start + length]

    def _name(self, what: str) -> str:
        raw = self._bytes(what, MAXIMUM_NAME)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"holds {what} that is not UTF-8: {quoted(raw)}") from None

    # ---- metadata -------------------------------------------------------------------------------------------------

    def _value(self, key: str, kind: int) -> GgufValue:
        if kind == _TEXT:
            raw = self._bytes(f"the text {quoted(key)}", MAXIMUM_TEXT)
            return raw.decode("utf-8", "replace") if len(raw) <= LONGEST_TEXT else raw
        if kind == _ARRAY:
            return self._array(key, self._unpack(_UINT32, f"the type of {quoted(key)}"))
        if kind not in _NUMBERS:
            raise self._error(f"has the unknown type {kind} for the value of {quoted(key)}")
        value = self._unpack(_SCALARS[kind], f"the value of {quoted(key)}")
        return self._truth(key, value) if kind == _BOOLEAN else value

    def _truth(self, key: str, value: int) -> bool:
        if value > 1:
            raise self._error(f"holds {value} for {quoted(key)}, which has to be 0 or 1")
        return bool(value)

    def _array(self, key: str, kind: int) -> Texts | array[Any]:
        count = self._unpack(_UINT64, f"the length of {quoted(key)}")
        if kind == _TEXT:
            return self._texts(key, self._count(f"texts in {quoted(key)}", count, 8))
        if kind not in _NUMBERS:
            called = "lists" if kind == _ARRAY else f"values of the unknown type {kind}"
            raise self._error(f"has a list of {called} as {quoted(key)}; lists of numbers and of texts are read")
        numbers = array(_NUMBERS[kind])
        length = self._count(f"numbers in {quoted(key)}", count, numbers.itemsize) * numbers.itemsize
        start = self._take(length, repr(key))
        numbers.frombytes(self.mapping[start : start + length])
        if kind == _BOOLEAN and max(numbers, default=0) > 1:
            raise self._error(f"holds {max(numbers)} in {quoted(key)}, which has to be of 0 and 1")
        return numbers

    def _texts(self, key: str, count: int) -> Texts:
        start = position = self.position
        ends = array("Q", bytes(8 * count))
        mapping, unpack = self.mapping, _UINT64.unpack_from
        try:
            for number in range(count):
                position += 8 + unpack(mapping, position)[0]
                ends[number] = position - start
        except (struct.error, OverflowError):  # a text that reaches far beyond the end
            position = self.size + 1
        if position > self.size:
            raise self._error(f"ends within the {count} texts of {quoted(key)}")
        self.position = position
        return Texts(self.mapping[start:position], ends)

    # ---- tensors --------------------------------------------------------------------------------------------------

    def _alignment(self, value: GgufValue) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value & (value - 1) or value > 1 << 30:
            raise self._error(f"has {shown(value)} as general.alignment; it has to be a power of two from 8 on")
        return value

    def _tensor(self) -> GgufTensor:
        """A description whose offset is still counted from where the tensors begin."""
        name = self._name("a tensor's name")
        called = f"the description of {quoted(name)}"
        dimensions = self._unpack(_UINT32, called)
        if not 1 <= dimensions <= MAXIMUM_DIMENSIONS:
            raise self._error(f"states {dimensions} dimensions for {quoted(name)}; 1 to {MAXIMUM_DIMENSIONS} are read")
        shape = tuple(self._unpack(_UINT64, called) for _ in range(dimensions))[::-1]
        number, offset = self._unpack(_UINT32, called), self._unpack(_UINT64, called)
        if number not in TYPES:
            raise self._error(f"stores {quoted(name)} in the type {number}, which torchchat does not know",
                              "fetch a file of another quantisation type, such as Q4_K_M or Q8_0")
        return GgufTensor(name, shape, TYPES[number], self.path, offset, self._bytes_of(name, shape, TYPES[number]))

    def _bytes_of(self, name: str, shape: tuple[int, ...], kind: TensorType) -> int:
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % kind.block_elements:
            raise self._error(f"states the shape {list(shape)} for {quoted(name)}, of type {kind.name}; rows have to "
                              "be "
                              f"of whole blocks of {kind.block_elements}, and nothing may be empty")
        size = elements // kind.block_elements * kind.block_bytes
        if size > self.size:
            raise self._error(f"states the shape {list(shape)} for {quoted(name)}, of type {kind.name}: {size} bytes, "
                              f"and it has {self.size} in all")
        return size

    def _placed(self, described: Sequence[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """By name, in the file's order, with offsets from the file's start."""
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for tensor in described:
            if tensor.name in tensors:
                raise self._error(f"holds two tensors of the name {quoted(tensor.name)}")
            if tensor.offset % alignment:
                raise self._error(f"states the offset {tensor.offset} for {quoted(tensor.name)}, which is no multiple "
                                  f"of its alignment, {alignment}")
            if start + tensor.offset + tensor.size > self.size:
                raise self._error(f"ends within the tensor {quoted(tensor.name)}: "
                                  f"{start + tensor.offset + tensor.size} "
                                  f"bytes are needed, and it has {self.size}")
            tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.type, tensor.path,
                                              start + tensor.offset, tensor.size)
        self._check_apart(tensors.values())
        return tensors

    def _check_apart(self, tensors: Any) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._error(f"has the tensors {quoted(before)} and {quoted(tensor.name)} in the same place")
            end, before = tensor.offset + tensor.size, tensor.name


_BOOLEAN, _TEXT, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOLEAN: "B", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {kind: struct.Struct(f"<{letter}") for kind, letter in _NUMBERS.items()}
_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")
