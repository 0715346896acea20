"""Exported files: what they hold, how they run, and how damaged and foreign ones are refused.

The runtime is a plugin of the tests: its program is a few bytes, and its weights are PyTorch's own format.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.archive import ALIGNMENT, Archive, ArchiveWriter
from torchchat_core.artifacts import (
    Artifact,
    Content,
    Manifest,
    Target,
    exported_file,
    has_manifest,
    open_artifact,
    write_artifact,
)
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import ModelRequest, fetch_files, open_checkpoint
from torchchat_core.plugins import load_registry
from torchchat_core.specs import TextContent
from torchchat_core.testing.models import tiny_config
from torchchat_core.text_content import text_content, text_format_of
from torchchat_core.text_format import read_text_format

BOXED = '''
import io
import torch
from tc_eager.executor import EagerExecutor
from torchchat_core.artifacts import Content, Target, new_manifest, open_artifact, whole_file, write_artifact
from torchchat_core.hookspecs import hookimpl
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.specs import ExecutorInfo, ExporterInfo, LoadRequest

COMMON = dict(devices=frozenset({"cpu"}), dtypes=frozenset({"fp32", "bf16"}), schemes=frozenset({"linear:int8"}))

class Exporter:
    def export(self, request):
        weights = io.BytesIO()
        torch.save(request.module.state_dict(), weights)
        manifest = new_manifest(request, "boxed", Target(device="cpu"), versions={}, weight_bytes=7, runtime={"box": 1})
        with whole_file(request.path) as path:
            path.write_bytes(b"a program " * 100)
            write_artifact(path, manifest, [Content.of("weights/all", weights.getvalue())])

class Executor:
    def load(self, request):
        artifact = open_artifact(request.artifact)
        module = Transformer(artifact.manifest.config).eval().requires_grad_(False).to(TORCH_DTYPES[request.dtype])
        module.load_state_dict(torch.load(io.BytesIO(artifact.read("weights/all", 1 << 30))))
        return EagerExecutor().load(LoadRequest(device="cpu", dtype=request.dtype, module=module))

@hookimpl
def torchchat_exporters():
    return [ExporterInfo(name="boxed", summary="a box", factory=__name__ + ":Exporter", writes="boxed", suffix=".pte",
                         stands_alone=True, flag="--output-box-path", **COMMON)]

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name="boxes", summary="runs boxes", factory=__name__ + ":Executor",
                         reads=frozenset({"boxed"}), **COMMON)]
'''
ASKED = ("--prompt", "Who are you?", "--temperature", "0", "--max-new-tokens", "8")


@pytest.fixture(autouse=True)
def boxes(make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_plugin(BOXED, "boxes")
    monkeypatch.setenv("TORCHCHAT_CPU_KERNELS", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "no-config.toml"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(torchchat: Any) -> Path:
    """The embedded model, exported."""
    done = torchchat("export", "embedded", "--output-box-path", "m.pte", "--max-seq-length", "300")
    assert done.code == 0, done.err
    return Path("m.pte")


def changed(path: Path, change: Callable[[dict[str, Any]], object], name: str = "changed.pte") -> Path:
    """A copy of the file whose manifest was changed."""
    artifact = open_artifact(path)
    content = json.loads(json.dumps(artifact.content))
    change(content)
    copy = Path(name)
    start, _ = artifact.place("manifest.json")
    copy.write_bytes(path.read_bytes()[: start - 128])  # what stands before it, without the directory
    with ArchiveWriter(copy) as archive, zipfile.ZipFile(path) as whole:
        for info in whole.infolist():
            data = json.dumps(content).encode() if info.filename.endswith("manifest.json") else whole.read(info)
            archive.add(info.filename, (data,), len(data))
    return copy


# ---- running ------------------------------------------------------------------------------------------------------


def test_a_file_answers_as_its_model_does(file: Path, torchchat: Any) -> None:
    answers = [torchchat("generate", model, *ASKED) for model in ("embedded", str(file))]
    assert answers[0].code == answers[1].code == 0, answers[1].err
    assert answers[0].out == answers[1].out
    assert "I am" in answers[1].out  # by its chat template


@pytest.mark.parametrize("arguments", [
    ("named so", "--pte-path", "m.pte"),
    ("--aoti-package-path", "m.pte"),
    ("m.pte", "-d", "bf16", "--device", "cpu", "--executor", "boxes", "--max-seq-length", "300"),
    ("m.pte", "-d", "fast"),
])
def test_what_is_said_of_the_file_may_be_true(file: Path, torchchat: Any, arguments: tuple[str, ...]) -> None:
    done = torchchat("generate", *arguments, *ASKED)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(("arguments", "words"), [
    (("-d", "fp32"), "m.pte is embedded as boxed for cpu in bf16, and --dtype fp32 was given: it computes in bf16"),
    (("--quantize", "linear:int8"), "--quantize linear:int8 was given: it is not quantised"),
    (("--device", "cuda"), "--device cuda was given: it runs on cpu"),
    (("--executor", "eager"), "which the executor 'eager' does not run"),
    (("--adapter", "x"), "--adapter was given: its weights cannot be changed"),
    (("--tokenizer-path", "m.pte"), "--tokenizer-path was given: its tokenizer cannot be changed"),
    (("--max-seq-length", "301"), "--max-seq-length is 301; the model takes 1 to 300"),
])
def test_a_wish_that_the_file_is_not_made_for_is_an_error(file: Path, torchchat: Any, arguments: tuple[str, ...],
                                                          words: str) -> None:
    done = torchchat("generate", "m.pte", *arguments, *ASKED)
    assert (done.code, words in done.err) == (1, True), done.err


@pytest.mark.parametrize(("dtype", "code"), [("bf16", 0), ("fp32", 1)])
def test_fast16_is_a_wish_for_half_precision(torchchat: Any, dtype: str, code: int) -> None:
    torchchat("export", "embedded", "--output-box-path", "m.pte", "-d", dtype)
    done = torchchat("generate", "m.pte", "-d", "fast16", *ASKED)
    assert (done.code, "--dtype fast16 was given: it computes in fp32" in done.err) == (code, bool(code)), done.err


def test_the_users_defaults_do_not_forbid_a_file(file: Path, torchchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DTYPE", "fp32"), ("EXECUTOR", "eager"), ("DEVICE", "cuda")):
        monkeypatch.setenv(f"TORCHCHAT_{name}", value)
    assert torchchat("generate", "m.pte", *ASKED).code == 0


def test_a_quantised_file_knows_its_recipe(torchchat: Any) -> None:
    recipe = '{"linear:int8": {"groupsize": 32}}'
    assert torchchat("export", "embedded", "--output-box-path", "q.pte", "--quantize", recipe).code == 0
    manifest = open_artifact(Path("q.pte")).manifest
    assert (manifest.recipe, manifest.schemes) == (json.loads(recipe), ("linear:int8",))
    done = torchchat("generate", "q.pte", "--quantize", "linear:int4", *ASKED)
    assert "it is quantised already (linear:int8)" in done.err


@pytest.mark.parametrize("arguments", [
    ("export", "m.pte", "--output-box-path", "again.pte"),
    ("convert", "m.pte", "--output-dir", "folder"),
    ("quantize", "m.pte", "--quantize", "linear:int8", "--output-dir", "folder"),
])
def test_nothing_is_made_of_an_exported_file(file: Path, torchchat: Any, arguments: tuple[str, ...]) -> None:
    done = torchchat(*arguments)
    assert (done.code, "m.pte is an exported file" in done.err) == (1, True), done.err


def test_a_file_may_have_no_ending_and_no_foreign_one(file: Path, torchchat: Any) -> None:
    for name, code in (("plain", 0), ("model.v1", 1)):
        shutil.copyfile(file, name)
        assert torchchat("generate", name, *ASKED).code == code


@pytest.mark.parametrize("name", ["m.gguf", "m.pt", "folder/model.safetensors"])
def test_a_checkpoint_that_hides_a_program_is_no_exported_file(file: Path, torchchat: Any, name: str) -> None:
    Path("folder").mkdir()
    shutil.copyfile(file, name)
    model = "folder" if name.startswith("folder") else name
    assert exported_file(fetch_files(ModelRequest(model=model), load_registry())) is None
    assert torchchat("generate", model, *ASKED).code == 1
    assert "no exported file" in torchchat("inspect", model).err


@pytest.mark.parametrize(("name", "kind"), [
    ("m.pte", "aoti-dso"), ("m.pte", "aoti-package"), ("m.pt2", "aoti-dso"), ("m.so", "aoti-package"),
    ("m.so", "executorch"), ("m.gguf", "aoti-dso"), ("m.safetensors", "aoti-dso"),
])
def test_a_kind_that_the_ending_does_not_announce_is_refused(file: Path, name: str, kind: str) -> None:
    changed(file, lambda content: content.update(kind=kind), "copy.pte")
    Path("copy.pte").replace(name)
    with pytest.raises(TorchchatError, match=f"holds a program of the kind '{kind}', whose files end in"):
        open_artifact(Path(name))


def test_paths_of_several_files_exclude_each_other(torchchat: Any) -> None:
    done = torchchat("generate", "--pte-path", "a", "--dso-path", "b")
    assert (done.code, "exclude each other" in done.err) == (2, True)


def test_the_length_is_refused_where_files_have_none(torchchat: Any) -> None:
    done = torchchat("export", "embedded", "-o", "m.gguf", "--max-seq-length", "5")
    assert (done.code, "do not limit the length" in done.err) == (1, True), done.err
    refused = torchchat("export", "embedded", "--output-box-path", "m.pte", "--max-seq-length", "100000")
    assert "the model takes 1 to" in refused.err


# ---- what a file says ---------------------------------------------------------------------------------------------


def test_where_and_inspect_show_the_manifest(file: Path, torchchat: Any) -> None:
    content = json.loads(torchchat("inspect", "m.pte", "--json", "--check").out)
    assert json.loads(torchchat("where", "m.pte", "--json").out)["manifest"] == content
    assert (content["kind"], content["max_seq_length"], content["runtime"]) == ("boxed", 300, {"box": 1})
    shown = torchchat("inspect", "m.pte").out
    assert "boxed" in shown
    assert "300 tokens" in shown


def test_other_files_are_not_inspected(torchchat: Any) -> None:
    Path("text.md").write_text("no model")
    Path("foreign.pte").write_bytes(b"ET12" * 1000)
    with zipfile.ZipFile("foreign.pt2", "w") as archive:
        archive.writestr("a/data", "something")
    assert "is no exported file" in torchchat("inspect", "text.md").err
    assert "there is no archive at the end" in torchchat("inspect", "foreign.pte").err
    assert "something else wrote it" in torchchat("generate", "foreign.pt2", "--prompt", "x").err


def test_entries_are_stored_and_aligned_and_open_with_zipfile(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    found = Archive(file)
    assert all(found.place(info.filename)[0] % ALIGNMENT == 0 for info in infos)
    assert file.read_bytes().startswith(b"a program")


def test_the_same_export_gives_the_same_bytes(file: Path, torchchat: Any) -> None:
    before = file.read_bytes()
    torchchat("export", "embedded", "--output-box-path", "m.pte", "--max-seq-length", "300")
    assert file.read_bytes() == before


@pytest.mark.parametrize("model", ["tinyllamas/stories260K/stories260K.pt", "tinyllamas/stories260K/stories260K.gguf",
                                   "hf/TinyStories-656K"])
def test_the_text_side_is_that_of_the_models_own_files(testdata: Path, model: str) -> None:
    registry, request = load_registry(), ModelRequest(model=str(testdata / model))
    files = fetch_files(request, registry)
    size = open_checkpoint(request, files, registry).config.vocab_size
    own, stored = (read_text_format(files, registry, size), text_content(files, registry, size))
    found = text_format_of(stored, registry)
    text = "Once upon a time, there was a b\u00e4r \U0001f43b."
    assert found.tokenizer.encode(text) == own.tokenizer.encode(text)
    assert (found.end_ids, found.defaults, found.template) == (own.end_ids, own.defaults, own.template)


# ---- damaged and hostile files ------------------------------------------------------------------------------------


def check(path: Path) -> Artifact:
    """All that is looked at before a file is run, and the reading of its tokenizer."""
    artifact = open_artifact(path)
    artifact.check_target()
    artifact.check()
    if artifact.manifest.text is not None:
        dict(artifact.manifest.text.tokenizer)
    return artifact


def test_a_file_that_was_cut_off_is_refused(file: Path) -> None:
    data, cut = file.read_bytes(), Path("cut.pte")
    for length in (0, 1, 21, 1000, len(data) // 2, len(data) - 2000, len(data) - 22, len(data) - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(TorchchatError):
            check(cut)


@pytest.mark.parametrize("part", ["program", "tokenizer", "weights/all"])
def test_a_changed_byte_is_refused(file: Path, part: str) -> None:
    artifact = open_artifact(file)
    name = next(name for name in artifact.manifest.digests if name.startswith(part))
    start, size = artifact.place(name)
    data = bytearray(file.read_bytes())
    data[start + size // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(TorchchatError, match="was changed after it was written"):
        check(file)


def test_a_changed_letter_of_the_manifest_is_refused(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(b'"dtype": "bf16"') == 1
    file.write_bytes(data.replace(b'"dtype": "bf16"', b'"dtype": "fp16"'))
    with pytest.raises(TorchchatError, match="is not what its checksum says"):
        open_artifact(file)


@pytest.mark.parametrize("place", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_an_entry_at_a_place_that_no_file_has_is_refused(tmp_path: Path, place: int) -> None:
    """The offset is in the field of 64 bits."""
    name, extra = b"torchchat/manifest.json", struct.pack("<HHQ", 1, 8, place)
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 2, 2, len(name), len(extra), 0, 0, 0, 0,
                        0xFFFFFFFF) + name + extra
    path = tmp_path / "m.pte"
    path.write_bytes(entry + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0, 0))
    with pytest.raises(TorchchatError, match="not where the directory says"):
        open_artifact(path)


def test_a_number_that_json_makes_infinite_is_refused(file: Path) -> None:
    data = file.read_bytes()
    changed(file, lambda content: content.update(sampling={"temperature": 12345678.5}), "hot.pte")
    start, size = Archive(Path("hot.pte")).place("torchchat/manifest.json")
    data = Path("hot.pte").read_bytes()
    manifest = data[start : start + size].replace(b"12345678.5", b"1e99999999")
    shutil.copyfile(file, "infinite.pte")
    Path("infinite.pte").write_bytes(data[: start - 128])
    with ArchiveWriter(Path("infinite.pte")) as archive, zipfile.ZipFile("hot.pte") as whole:
        for info in whole.infolist():
            content = manifest if info.filename.endswith("manifest.json") else whole.read(info)
            archive.add(info.filename, (content,), len(content))
    with pytest.raises(TorchchatError, match="has a value out of range"):
        open_artifact(Path("infinite.pte"))


def test_the_files_of_a_tokenizer_are_bounded_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = open_artifact(file).manifest.text
    assert text is not None
    sizes = [len(data) for data in text.tokenizer.values()]
    monkeypatch.setattr("torchchat_core.artifacts.MAXIMUM_TOKENIZER", sum(sizes) - 1)
    with pytest.raises(TorchchatError, match=f"have {sum(sizes)} bytes"):
        open_artifact(file)


def test_entries_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pte"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("first", b"x" * 100)
        archive.writestr("other", b"y" * 100)
        archive.infolist()[1].header_offset = 0
    with pytest.raises(TorchchatError, match="overlap"):
        Archive(path)


def test_whatever_byte_is_changed_nothing_but_a_refusal_comes(file: Path) -> None:
    artifact = open_artifact(file)
    start = artifact.place("manifest.json")[0] - 200
    data, chance = file.read_bytes(), random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(start, len(data))] = chance.randrange(256)
        Path("broken.pte").write_bytes(broken)
        has_manifest(Path("broken.pte"))
        with contextlib.suppress(TorchchatError):
            open_artifact(Path("broken.pte"))


@pytest.mark.parametrize(("change", "words"), [
    (lambda content: content.update(format_version=2), "is of format version 2; this torchchat reads version 1"),
    (lambda content: content.update(format="other"), "is not torchchat's"),
    (lambda content: content["target"].update(machine="sparc64"), "was made for sparc64"),
    (lambda content: content["target"].update(system="beos"), "was made for beos"),
    (lambda content: content["target"].update(device="abacus"), "'device' in 'target'"),
    (lambda content: content["config"].update(hidden_size=1 << 40), "hidden_size is"),
    (lambda content: content["config"].update(num_layers=True), "'num_layers' in the config"),
    (lambda content: content["config"].update(norm_eps="0"), "'norm_eps' in the config"),
    (lambda content: content["config"].update(new=1), "the unknown field 'new'"),
    (lambda content: content["config"].pop("num_heads"), "no field 'num_heads'"),
    (lambda content: content["config"].update(sliding_layers=[True]), "1 sliding_layers"),
    (lambda content: content["config"].update(rope_scaling={"kind": "odd"}), "of the kind 'odd'"),
    (lambda content: content.update(max_seq_length=1 << 30), "'max_seq_length'"),
    (lambda content: content.update(dtype="fp8"), "one of fp32, bf16, fp16"),
    (lambda content: content.update(end_ids=[-1]), "'end_ids'"),
    (lambda content: content.update(schemes="x"), "a list"),
    (lambda content: content.update(sampling={"temperature": "hot"}), "not of numbers"),
    (lambda content: content.update(sampling={"top_q": 0.5}), "names 'top_q', which is no such option"),
    (lambda content: content.update(sampling={"top_p": 7}), "has a value out of range"),
    (lambda content: content.update(sampling={"temperature": 10**400}), "has a value out of range"),
    (lambda content: content["config"].update(norm_eps=10**400), "'norm_eps' in the config"),
    (lambda content: content.update(model="\ud800"), "'model' in the manifest"),
    (lambda content: content.update(chat_template="\udc80"), "'chat_template' in the manifest"),
    (lambda content: content["tokenizer"].update(files=[f"tokenizer/{each}" for each in range(17)]), "names 17 files"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/a", "tokenizer/a"]), "16 different ones"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/../../evil"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["weights/all"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/.hidden"]), "no file of a tokenizer"),
    (lambda content: content["tokenizer"].update(files=["tokenizer/none"]), "has no entry"),
    (lambda content: content["digests"].pop("program"), "none of the program"),
    (lambda content: content["digests"].update(program="x"), "64 hexadecimal digits"),
    (lambda content: content["digests"].update({"weights/more": "0" * 64}), "has no entry"),
    (lambda content: content["program"].update(bytes=1 << 50), "is not whole"),
    (lambda content: content["program"].update(entry="nowhere"), "has no entry 'nowhere'"),
])
def test_a_manifest_that_cannot_be_true_is_refused(file: Path, change: Callable[[dict[str, Any]], object], words: str
                                                   ) -> None:
    with pytest.raises(TorchchatError) as refused:
        check(changed(file, change))
    assert words in refused.value.message


def test_a_file_that_nothing_installed_runs_says_what_would(file: Path, torchchat: Any) -> None:
    changed(file, lambda content: content.update(kind="unheard-of"))
    done = torchchat("generate", "changed.pte", *ASKED)
    assert (done.code, "nothing installed runs unheard-of files" in done.err) == (1, True), done.err


def test_compressed_entries_are_refused(file: Path) -> None:
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile("small.pte", "w", zipfile.ZIP_DEFLATED) as archive:
        for info in whole.infolist():
            archive.writestr(info.filename, whole.read(info))
    with pytest.raises(TorchchatError, match="is compressed"):
        open_artifact(Path("small.pte"))


def test_large_archives_use_the_wide_records(tmp_path: Path) -> None:
    """More entries than 16 bits count."""
    path = tmp_path / "many"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(66_000):
            archive.writestr(str(index), b"")
    assert len(Archive(path).entries) == 66_000


def test_strange_names_of_tokenizers_become_plain_ones(tmp_path: Path) -> None:
    text = TextContent(tokenizer={"a/b:c.model": b"x"}, tokenizer_kind="sentencepiece", bos_id=None, eos_id=None,
                       adds_bos=False, end_ids=())
    path = tmp_path / "m.pte"
    path.write_bytes(b"program")
    write_artifact(path, Manifest(kind="boxed", model="m", config=tiny_config(), dtype="fp32", max_seq_length=5,
                                  target=Target(device="cpu"), text=text), [Content.of("more", b"y")])
    found = open_artifact(path).manifest.text
    assert found is not None
    assert dict(found.tokenizer) == {"a_b_c.model": b"x"}


def test_unzip_reads_such_files(file: Path) -> None:
    if shutil.which("unzip") is None:
        pytest.skip("there is no unzip here")
    assert subprocess.run(["unzip", "-tq", str(file)], capture_output=True, check=False).returncode in (0, 1)
