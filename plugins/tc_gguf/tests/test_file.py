"""tc_gguf.file: what a GGUF file states, and what is refused before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tc_gguf.file import LONGEST_TEXT, MAXIMUM_KEYS, MAXIMUM_TEXT, GgufFile, read_gguf, read_split
from torchchat_core.errors import TorchchatError

Read = Callable[[bytes], GgufFile]
Make = Callable[..., bytes]
F32, Q8_0 = 0, 8


@pytest.fixture
def read(written: Callable[[bytes], Path]) -> Read:
    return lambda raw: read_gguf(written(raw))


def refused(read: Read, raw: bytes, message: str) -> None:
    with pytest.raises(TorchchatError, match=message) as caught:
        read(raw)
    assert "model.gguf" in caught.value.message
    assert caught.value.fix


# ---- what is read -------------------------------------------------------------------------------------------------


def test_values_of_every_type_are_read(read: Read, make_gguf: Make) -> None:
    scalars = {0: ("B", 200), 1: ("b", -100), 2: ("H", 60000), 3: ("h", -30000), 4: ("I", 4 << 28), 5: ("i", -5),
               6: ("f", 0.5), 7: ("B", 1), 10: ("Q", 1 << 63), 11: ("q", -(1 << 62)), 12: ("d", 0.1)}
    metadata: dict[str, Any] = {f"single.{kind}": struct.pack(f"<I{form}", kind, value)
                                for kind, (form, value) in scalars.items()}
    metadata |= {f"list.{kind}": struct.pack(f"<IIQ2{form}", 9, kind, 2, value, value)
                 for kind, (form, value) in scalars.items()}
    file = read(make_gguf({**metadata, "text": "wörld", "texts": ["", "ä", "longer"]}, {}))
    for kind, (_, value) in scalars.items():
        assert file.metadata[f"single.{kind}"] == value
        assert list(file.metadata[f"list.{kind}"]) == [value, value]
    assert file.metadata["single.7"] is True
    assert file.text("text") == "wörld"
    assert list(file.texts("texts")) == ["", "ä", "longer"]


@pytest.mark.parametrize("version", [2, 3])
def test_shapes_are_outermost_first_and_offsets_from_the_start(read: Read, make_gguf: Make, version: int) -> None:
    raw = make_gguf({}, {"a": (F32, (2, 3), b"A" * 24), "b": (Q8_0, (1, 64), b"B" * 68)}, version=version)
    file = read(raw)
    a, b = file.tensors.values()
    assert (file.version, a.shape, a.type.name, a.size) == (version, (2, 3), "F32", 24)
    assert raw[a.offset : a.offset + a.size] == b"A" * 24
    assert (b.shape, b.type.name, b.size) == ((1, 64), "Q8_0", 68)
    assert raw[b.offset : b.offset + b.size] == b"B" * 68


def test_another_alignment_is_followed(read: Read, make_gguf: Make) -> None:
    raw = make_gguf({"general.alignment": 128}, {"a": (F32, (1,), b"AAAA"), "b": (F32, (1,), b"BBBB")}, alignment=128)
    file = read(raw)
    assert [tensor.offset % 128 for tensor in file.tensors.values()] == [0, 0]
    assert raw[file.tensors["b"].offset :][:4] == b"BBBB"


def test_a_vocabulary_alone_may_end_unaligned(read: Read, make_gguf: Make) -> None:
    assert read(make_gguf({"a.text": "abc"}, {}).rstrip(b"\0")).tensors == {}


def test_texts_behave_like_a_list(read: Read, make_gguf: Make) -> None:
    texts = read(make_gguf({"texts": ["a", "bc", "def"]}, {})).texts("texts")
    assert (len(texts), texts[0], texts[-1], texts[1:]) == (3, "a", "def", ["bc", "def"])
    assert texts == ["a", "bc", "def"]
    with pytest.raises(IndexError):
        texts[3]


def test_damaged_utf8_in_a_token_becomes_the_replacement_character(read: Read, make_gguf: Make) -> None:
    raw = struct.pack("<IIQQ", 9, 8, 1, 2) + b"a\xff"
    assert list(read(make_gguf({"texts": raw}, {})).texts("texts")) == ["a\ufffd"]


def test_texts_that_nothing_reads_may_be_long(read: Read, make_gguf: Make) -> None:
    file = read(make_gguf({"a": "x" * LONGEST_TEXT, "b": "x" * (LONGEST_TEXT + 1)}, {}))
    assert file.text("a") == "x" * LONGEST_TEXT
    with pytest.raises(TorchchatError, match=rf"b is a text of {LONGEST_TEXT + 1} bytes in model\.gguf; .* at most"):
        file.text("b")


def test_lookups_name_the_key_and_the_value_of_another_type(read: Read, make_gguf: Make) -> None:
    file = read(make_gguf({"a": "text", "b": True, "c": float("nan"), "d": [1.5]}, {}))
    for look in (lambda: file.integer("a"), lambda: file.integer("b"), lambda: file.number("c"),
                 lambda: file.boolean("a"), lambda: file.text("b"), lambda: file.texts("d"),
                 lambda: file.integers("d")):
        with pytest.raises(TorchchatError, match=r"in model\.gguf; it has to be"):
            look()
    with pytest.raises(TorchchatError, match=r"model\.gguf has no 'missing'"):
        file.integer("missing")
    assert file.integer("missing", 3) == 3


def test_arrays_stay_as_compact_as_they_are_stored(tmp_path: Path, make_gguf: Make) -> None:
    empty_texts = struct.pack("<IIQ", 9, 8, 200_000) + bytes(8 * 200_000)
    booleans = struct.pack("<IIQ", 9, 7, 1_000_000) + bytes(1_000_000)
    path = tmp_path / "model.gguf"
    path.write_bytes(make_gguf({"a": empty_texts, "b": booleans}, {}))
    tracemalloc.start()
    try:
        file = read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert len(file.texts("a")) == 200_000


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_other_kinds_of_file_are_refused(read: Read, make_gguf: Make, tmp_path: Path) -> None:
    whole = make_gguf({"a": 1}, {})
    refused(read, b"", "too short")
    refused(read, b"PK\3\4" + bytes(60), "no GGUF file: it starts with b'PK")
    refused(read, b"tjgg" + bytes(60), "an old format of llama.cpp")
    refused(read, whole[:4] + struct.pack(">I", 3) + whole[8:], "big-endian")
    refused(read, whole[:4] + struct.pack("<I", 1) + whole[8:], "of GGUF version 1; versions 2 and 3 are read")
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(TorchchatError, match="is no file"):
            read_gguf(path)


def test_counts_beyond_the_file_are_refused_before_allocating(read: Read, make_gguf: Make) -> None:
    head = b"GGUF" + struct.pack("<I", 3)
    huge = (1 << 64) - 1
    refused(read, head + struct.pack("<QQ", huge, 0) + bytes(64), f"states {huge} tensors")
    refused(read, head + struct.pack("<QQ", 0, 1 << 40) + bytes(64), "states 1099511627776 metadata keys")
    refused(read, head + struct.pack("<QQ", 0, MAXIMUM_KEYS + 1) + bytes(13 * MAXIMUM_KEYS + 13), "at most 4096")
    refused(read, head + struct.pack("<QQQ", 0, 1, huge) + bytes(64), f"states {huge} bytes for a metadata key")
    refused(read, head + struct.pack("<QQQ", 0, 1, 1000) + bytes(64), "ends within a metadata key")
    for kind in (0, 8, 12):
        refused(read, make_gguf({"a": struct.pack("<IIQ", 9, kind, huge)}, {}), f"states {huge} .* in 'a'")
    refused(read, make_gguf({"a": struct.pack("<IQ", 8, MAXIMUM_TEXT + 1)}, {}), "bytes for the text 'a'")


@pytest.mark.parametrize("length", [50, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_a_text_within_a_list_that_reaches_beyond_the_end_is_refused(read: Read, make_gguf: Make, length: int) -> None:
    refused(read, make_gguf({"a": struct.pack("<IIQQ", 9, 8, 2, length) + bytes(16)}, {}), "ends within the 2 texts")


def test_unknown_types_and_nested_lists_are_refused(read: Read, make_gguf: Make) -> None:
    refused(read, make_gguf({"a": struct.pack("<I", 13)}, {}), "unknown type 13 for the value of 'a'")
    refused(read, make_gguf({"a": struct.pack("<IIQ", 9, 13, 1)}, {}), "a list of values of the unknown type 13 as 'a'")
    refused(read, make_gguf({"a": struct.pack("<IIQ", 9, 9, 1)}, {}), "a list of lists as 'a'")
    refused(read, make_gguf({"a": struct.pack("<IB", 7, 2)}, {}), "holds 2 for 'a', which has to be 0 or 1")
    refused(read, make_gguf({"a": struct.pack("<IIQB", 9, 7, 1, 2)}, {}), "holds 2 in 'a', which has to be of 0 and 1")
    refused(read, make_gguf({}, {"a": (4, (32,), bytes(64))}), "stores 'a' in the type 4")


def test_names_have_to_be_utf8_and_unique(read: Read, make_gguf: Make) -> None:
    tensor = (F32, (1,), bytes(4))
    raw = make_gguf({"aa": 1, "bb": 2}, {"cc": tensor, "dd": tensor})
    refused(read, raw.replace(b"aa", b"\xff\xff"), "a metadata key that is not UTF-8")
    refused(read, raw.replace(b"cc", b"\xff\xff"), "a tensor's name that is not UTF-8")
    refused(read, raw.replace(b"bb", b"aa"), "the metadata key 'aa' twice")
    refused(read, raw.replace(b"dd", b"cc"), "two tensors of the name 'cc'")


@pytest.mark.parametrize("value", [0, 1, 48, 1 << 31, "32", True, -32.0])
def test_impossible_alignments_are_refused(read: Read, make_gguf: Make, value: object) -> None:
    refused(read, make_gguf({"general.alignment": value}, {}), "as general.alignment; it has to be a power of two")


def test_impossible_shapes_are_refused(read: Read, make_gguf: Make) -> None:
    refused(read, make_gguf({}, {"a": (F32, (), bytes(64))}), "states 0 dimensions for 'a'")
    refused(read, make_gguf({}, {"a": (F32, (1,) * 5, bytes(64))}), "states 5 dimensions for 'a'")
    refused(read, make_gguf({}, {"a": (F32, (2, 0), bytes(64))}), r"states the shape \[2, 0\] for 'a'")
    refused(read, make_gguf({}, {"a": (Q8_0, (2, 48), bytes(136))}), "whole blocks of 32")
    for shape in ((1 << 32, 1 << 32), (1 << 63, 2), ((1 << 64) - 1,) * 4, (100,)):
        refused(read, make_gguf({}, {"a": (F32, shape, bytes(64))}), r"states the shape .* and it has \d+ in all")


def test_tensors_have_to_be_apart_aligned_and_within_the_file(read: Read, make_gguf: Make) -> None:
    raw = make_gguf({}, {"a": (F32, (16,), b"A" * 64), "b": (F32, (16,), b"B" * 64)})
    place = raw.index(struct.pack("<IQ", F32, 64)) + 4
    moved = [raw[:place] + struct.pack("<Q", offset) + raw[place + 8 :] for offset in (32, 40, 96, 1 << 63)]
    refused(read, moved[0], "the tensors 'a' and 'b' in the same place")
    refused(read, moved[1], "the offset 40 for 'b', which is no multiple")
    refused(read, moved[2], "ends within the tensor 'b'")
    refused(read, moved[3], "ends within the tensor 'b'")


def test_every_truncation_of_a_file_is_refused(read: Read, make_gguf: Make) -> None:
    raw = make_gguf({"a": ["x", "yy"], "b": 1.0, "c": "text"}, {"a": (F32, (2, 4), bytes(32))})
    for length in range(len(raw)):
        with pytest.raises(TorchchatError):
            read(raw[:length])


# ---- split files --------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path, make_gguf: Make) -> Callable[..., list[Path]]:
    def parts(*changes: Mapping[str, Any]) -> list[Path]:
        paths = []
        for number, change in enumerate(changes):
            metadata = {"split.no": number, "split.count": 2, "split.tensors.count": 2, "of": number, **change}
            name = metadata.pop("tensor", f"tensor{number}")
            metadata = {key: value for key, value in metadata.items() if value is not None}
            paths.append(tmp_path / f"model-{number + 1:05}-of-00002.gguf")
            paths[-1].write_bytes(make_gguf(metadata, {name: (F32, (1,), bytes(4))}))
        return paths
    return parts


def test_split_files_are_read_as_one(parts: Callable[..., list[Path]]) -> None:
    paths = parts({"general.name": "one"}, {})
    file = read_split(paths)
    assert {name: tensor.path for name, tensor in file.tensors.items()} == dict(zip(("tensor0", "tensor1"), paths,
                                                                                    strict=True))
    assert file.integer("of") == 0


@pytest.mark.parametrize(("first", "second", "message"), [
    ({"split.no": 1}, {}, "is part 2 of 2; part 1 of 2 was expected"),
    ({}, {"split.count": 3}, "is part 2 of 3; part 2 of 2 was expected"),
    ({}, {"split.count": None}, "holds no split.count"),
    ({}, {"tensor": "tensor0"}, "'tensor0' is in two of the files"),
    ({"split.tensors.count": 3}, {}, "hold 2 tensors; its split.tensors.count is 3"),
    ({"split.no": "0"}, {}, "split.no is '0'"),
    ({"general.architecture": "llama"}, {"general.architecture": "qwen2"},
     r"architecture is 'qwen2' in model-00002-of-00002\.gguf, and 'llama' in model-00001"),
    ({"general.name": "one"}, {"general.name": "other"}, "general.name is 'other' in .*, and 'one' in"),
])
def test_parts_that_do_not_belong_together_are_refused(
    parts: Callable[..., list[Path]], first: Mapping[str, Any], second: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(TorchchatError, match=message):
        read_split(parts(first, second))


def test_one_part_under_another_name_is_refused(parts: Callable[..., list[Path]]) -> None:
    with pytest.raises(TorchchatError, match="is part 1 of 2; part 1 of 1 was expected"):
        read_split(parts({})[:1])
