"""What Python's reader refuses of a file, C++'s refuses too: each case goes to both."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from probing import Probe, ProbeError

from torchchat_core.archive import ArchiveWriter
from torchchat_core.artifacts import MAXIMUM_TOKENIZER, Content, Manifest, Target, open_artifact, write_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.specs import TextContent
from torchchat_core.testing.models import tiny_config

PROGRAM = b"a program " * 30
MANIFEST = "torchchat/manifest.json"
TOKENIZER = "tokenizer/tokenizer.model"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file that is in order, though no runtime runs it."""
    path = tmp_path / "m.pte"
    text = TextContent(tokenizer={"tokenizer.model": b"a few letters"}, tokenizer_kind="sentencepiece", bos_id=1,
                       eos_id=2, adds_bos=True, end_ids=(1, 2), sampling={"temperature": 0.5, "top_k": 3})
    path.write_bytes(PROGRAM)
    write_artifact(path, Manifest(kind="executorch", model="m", config=tiny_config(), dtype="fp32", max_seq_length=5,
                                  target=Target(device="cpu"), text=text), [Content.of("weights/all", b"w" * 99)])
    return path


def by_python(path: Path) -> dict[str, Any]:
    artifact = open_artifact(path)
    artifact.check_target()
    artifact.check()
    assert artifact.manifest.text is not None
    files = {name: len(data) for name, data in artifact.manifest.text.tokenizer.items()}
    return {"kind": artifact.manifest.kind, "program": artifact.place("program")[1], "files": files}


def by_both(path: Path, probe: Probe) -> str:
    """What C++ says; the test fails where either of them takes the file."""
    with pytest.raises(TorchchatError):
        by_python(path)
    with pytest.raises(ProbeError) as refused:
        probe.ask("artifact", path=str(path))
    return str(refused.value)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file anew, with another manifest and checksums that hold."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    content = json.loads(entries[MANIFEST])
    change(content)
    path.write_bytes(PROGRAM)
    with ArchiveWriter(path) as writer:
        for name, data in {**entries, MANIFEST: json.dumps(content).encode()}.items():
            writer.add(name, (data,), len(data))


def test_a_file_that_is_in_order_is_read_alike(file: Path, tmp_path: Path, probe: Probe) -> None:
    expected = {"kind": "executorch", "program": len(PROGRAM), "files": {"tokenizer.model": 13}}
    for name in ("m.pte", "M.PTE", "no-ending"):
        path = file.rename(tmp_path / name)
        assert probe.ask("artifact", path=str(path)) == by_python(path) == expected
        file = path.rename(tmp_path / "m.pte")
    file.write_bytes(file.read_bytes() + b"\n")  # behind the archive
    assert probe.ask("artifact", path=str(file)) == by_python(file) == expected


@pytest.mark.parametrize(("change", "said"), [
    (lambda content: content.update(format_version=2), "format version 2"),
    (lambda content: content.update(format_version=True), "format_version"),
    (lambda content: content.update(format="other"), "not torchchat's"),
    (lambda content: content.pop("kind"), "'kind'"),
    (lambda content: content.update(kind="aoti-package"), "whose files end in .pt2"),
    (lambda content: content.update(model=3), "'model'"),
    (lambda content: content.update(model="m" * (1 << 20) + "m"), "'model'"),
    (lambda content: content["target"].update(machine="sparc64"), "sparc64"),
    (lambda content: content["target"].update(system="beos"), "beos"),
    (lambda content: content["target"].update(device="abacus"), "abacus"),
    (lambda content: content.update(max_seq_length=1 << 30), "max_seq_length"),
    (lambda content: content.update(max_seq_length=5.0), "max_seq_length"),
    (lambda content: content["config"].update(vocab_size=-1), "vocab_size"),
    (lambda content: content["config"].pop("max_context"), "max_context"),
    (lambda content: content.update(dtype="fp8"), "fp8"),
    (lambda content: content.update(end_ids=[-1]), "end_ids"),
    (lambda content: content.update(end_ids=[1 << 40]), "end_ids"),
    (lambda content: content.update(bos_id="1"), "bos_id"),
    (lambda content: content.update(adds_bos=1), "adds_bos"),
    (lambda content: content.pop("adds_bos"), "adds_bos"),
    (lambda content: content.update(sampling=None), "sampling"),
    (lambda content: content.update(sampling={"temperature": "hot"}), "no number"),
    (lambda content: content.update(sampling={"temperature": None}), "no number"),
    (lambda content: content.update(sampling={"temperature": True}), "no number"),
    (lambda content: content.update(sampling={"top_q": 0.5}), "'top_q', which is no option"),
    (lambda content: content.update(sampling={"top_p": 7}), "top_p is 7; it has to be above 0, at most 1"),
    (lambda content: content.update(sampling={"top_k": 1.5}), "top_k"),
    (lambda content: content.update(sampling={"repetition_penalty": 0.001}), "0.01 to 100"),
    (lambda content: content.update(sampling={"temperature": 10**400}), ""),
    (lambda content: content.update(model="\ud800"), "no JSON"),
    (lambda content: content["tokenizer"].update(files=[f"tokenizer/{each}" for each in range(17)]), "names 17 files"),
    (lambda content: content["tokenizer"].update(files=[TOKENIZER, TOKENIZER]), "16 different ones"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/../../evil"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/a\nb"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/" + "n" * 151]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["weights/all"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/.hidden"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=[1]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files="x"), "names no files"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/none"]), "tokenizer/none"),
    (lambda content: content["digests"].pop(TOKENIZER), "no digest of 'tokenizer/tokenizer.model'"),
    (lambda content: content["digests"].pop("program"), "no digest of the program"),
    (lambda content: content["digests"].update(program="x"), "digest of 'program'"),
    (lambda content: content["digests"].update({"weights/more": "0" * 64}), "weights/more"),
    (lambda content: content["digests"].update({"weights/all": "0" * 64}), "changed after it was written"),
    (lambda content: content["program"].update(bytes=1 << 50), "not whole"),
    (lambda content: content["program"].update(entry="nowhere"), "nowhere"),
    (lambda content: content.update(runtime=[]), "runtime"),
])
def test_a_manifest_that_cannot_be_true(change: Callable[[dict[str, Any]], object], said: str, file: Path,
                                        probe: Probe) -> None:
    rewritten(file, change)
    assert said in by_both(file, probe)


@pytest.mark.parametrize("ending", [".pt2", ".so", ".gguf", ".safetensors", ".pt"])
def test_a_program_in_the_guise_of_another_file(ending: str, file: Path, probe: Probe) -> None:
    path = file.rename(file.with_suffix(ending))
    assert f"ends in '{ending}', and holds a program of the kind 'executorch'" in by_both(path, probe)


def test_a_file_that_was_cut_off(file: Path, probe: Probe) -> None:
    data = file.read_bytes()
    for length in (0, 1, 21, len(PROGRAM), len(data) // 2, len(data) - 200, len(data) - 22, len(data) - 1):
        file.write_bytes(data[:length])
        by_both(file, probe)


@pytest.mark.parametrize(("before", "after", "said"), [
    (b'"dtype": "fp32"', b'"dtype": "bf16"', "manifest is not what its checksum says"),
    (b"a few letters", b"a few lettres", "tokenizer/tokenizer.model' is not what its digest says"),
    (b"w" * 99, b"w" * 98 + b"v", "weights/all' is not what its digest says"),
    (PROGRAM, b"A" + PROGRAM[1:], "program' is not what its digest says"),
])
def test_a_changed_byte(before: bytes, after: bytes, said: str, file: Path, probe: Probe) -> None:
    data = file.read_bytes()
    assert data.count(before) == 1
    file.write_bytes(data.replace(before, after))
    assert said in by_both(file, probe)


def test_the_name_in_front_of_the_data_is_compared(file: Path, probe: Probe) -> None:
    data = file.read_bytes()
    name = b"torchchat/" + TOKENIZER.encode()
    file.write_bytes(data.replace(name, name.replace(b"model", b"nodel"), 1))
    assert "not where the directory says" in by_both(file, probe)


def test_compressed_entries(file: Path, probe: Probe) -> None:
    with zipfile.ZipFile(file) as whole:
        entries = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert "compressed" in by_both(file, probe)


def test_entries_that_share_bytes(file: Path, probe: Probe) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first", b"x" * 100)
        archive.writestr("other", b"y" * 100)
        archive.infolist()[1].header_offset = 0
    assert "overlap" in by_both(file, probe)


def test_two_entries_of_one_name(file: Path, probe: Probe) -> None:
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MANIFEST, b"{}")
    assert "two entries" in by_both(file, probe)


@pytest.mark.parametrize("place", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_an_entry_at_a_place_that_no_file_has(place: int, tmp_path: Path, probe: Probe) -> None:
    """The offset is in the field of 64 bits."""
    name, extra = MANIFEST.encode(), struct.pack("<HHQ", 1, 8, place)
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 2, 2, len(name), len(extra), 0, 0, 0, 0,
                        0xFFFFFFFF) + name + extra
    path = tmp_path / "m.pte"
    path.write_bytes(entry + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0, 0))
    by_both(path, probe)


def test_the_files_of_a_tokenizer_are_bounded_together(file: Path, probe: Probe) -> None:
    """The file has a hole, so that it takes no room."""
    size = MAXIMUM_TOKENIZER // 2 + 1
    with zipfile.ZipFile(file) as whole:
        content = json.loads(whole.read(MANIFEST))
    content["tokenizer"]["files"] = ["tokenizer/a.model", "tokenizer/b.model"]
    content["digests"] = {"program": content["digests"]["program"],
                          **{f"tokenizer/{name}.model": "0" * 64 for name in "ab"}}
    manifest = json.dumps(content).encode()
    file.write_bytes(PROGRAM)
    with ArchiveWriter(file) as archive:
        archive.add(MANIFEST, (manifest,), len(manifest))
        start = archive._archive.start_dir  # the directory is written there in the end
    sparse_entries(file, start, ["torchchat/tokenizer/a.model", "torchchat/tokenizer/b.model"], size)
    assert f"have {2 * size} bytes" in by_both(file, probe)


def sparse_entries(path: Path, start: int, names: list[str], size: int) -> None:
    """Adds entries of zeros that were never written, in place of the directory at `start`."""
    with path.open("r+b") as to:
        to.seek(start)
        directory = to.read()
        count, length = struct.unpack_from("<HI", directory, directory.rindex(b"PK\5\6") + 10)
        records = directory[:length]
        for name in map(str.encode, names):
            to.seek(start)
            to.write(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name)
            records += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0,
                                   0, start) + name
            start += 30 + len(name) + size
        to.seek(start)
        count += len(names)
        to.write(records + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(records), start, 0))


def test_of_two_manifests_both_read_the_first(file: Path, probe: Probe) -> None:
    with zipfile.ZipFile(file) as whole:
        entries = {info.filename: whole.read(info) for info in whole.infolist()}
    file.write_bytes(PROGRAM)
    with ArchiveWriter(file) as archive:
        archive.add("z/" + MANIFEST, (b"{}",), 2)
        for name, data in entries.items():
            archive.add(name, (data,), len(data))
    assert "not torchchat's" in by_both(file, probe)


@pytest.mark.parametrize(("change", "said"), [
    (lambda content: content["target"].update(device="cuda"), "made for cuda"),
    (lambda content: content.update(chat_template="{{ messages }}", chat_pieces=None), "without the pieces"),
    (lambda content: content.update(tokenizer=None), "holds no tokenizer"),
    (lambda content: content.update(vocab_size=7), "not that of its config"),
    (lambda content: content["runtime"].update(deep=json.loads("[" * 70 + "]" * 70)), "nested more than 64 deep"),
])
def test_what_the_program_cannot_run_is_refused(change: Callable[[dict[str, Any]], object], said: str, file: Path,
                                                probe: Probe) -> None:
    rewritten(file, change)
    with pytest.raises(ProbeError) as refused:
        probe.ask("artifact", path=str(file))
    assert said in str(refused.value)
