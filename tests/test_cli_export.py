"""`torchchat export`: which exporter writes what, where to, and with which options."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import output_file
from torchchat_core.sources.local import EMBEDDED

EXPORTERS = '''
from dataclasses import dataclass
from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.specs import ExporterInfo

CPU, DTYPES = frozenset({"cpu"}), frozenset({"fp32", "bf16"})

@dataclass(frozen=True)
class Options:
    level: int = option(1, "how much", minimum=0, maximum=9)
    kind: str = option("plain", "which", choices=("plain", "fancy"))

@dataclass(frozen=True)
class OtherOptions:
    depth: int = option(2, "how deep", minimum=0)

class Writes:
    def export(self, request):
        if request.options is not None and getattr(request.options, "level", 0) == 9:
            raise TorchchatError("nine is too much")
        request.path.write_text(f"{request.dtype} {request.device} {request.options} {request.files.format}")

@hookimpl
def torchchat_exporters():
    return [ExporterInfo(name="one", summary="a file of one", factory=__name__ + ":Writes", writes="one", suffix=".one",
                         devices=CPU, dtypes=DTYPES, options=Options, flag="--output-one-path"),
            ExporterInfo(name="two", summary="a file of two", factory=__name__ + ":Writes", writes="two", suffix=".two",
                         devices=CPU, dtypes=frozenset({"bf16"}), options=OtherOptions)]
'''


@pytest.fixture(autouse=True)
def exporters(make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_plugin(EXPORTERS, "exporters")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "no-config.toml"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("arguments", "content"), [
    (["-o", "a.one"], "bf16 cpu Options(level=1, kind='plain') safetensors"),
    (["--output-one-path", "any name"], "bf16 cpu Options(level=1, kind='plain') safetensors"),
    (["-o", "a.ONE", "--level", "3", "--kind", "fancy", "-d", "fp32"], "fp32 cpu Options(level=3, kind='fancy') "
                                                                        "safetensors"),
    (["-o", "a.two", "--depth", "7"], "bf16 cpu OtherOptions(depth=7) safetensors"),
])
def test_the_ending_or_the_flag_chooses_the_exporter(arguments: list[str], content: str, torchchat: Any) -> None:
    done = torchchat("export", "embedded", *arguments)
    assert (done.code, done.out) == (0, f"{arguments[1]}\n")
    assert Path(arguments[1]).read_text() == content


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, "say where to write"),
    (["-o", "a.one", "--output-one-path", "b"], 2, "exclude each other"),
    (["-o", "a.three"], 2, "has the extension '.three'"),
    (["-o", "a"], 2, "has no extension"),
    (["-o", "a.one", "--level", "10"], 2, "level is 10; it has to be 0 to 9"),
    (["-o", "a.one", "--level", "x"], 2, "level is 'x'; it has to be a whole number"),
    (["-o", "a.one", "--kind", "odd"], 2, "one of plain, fancy"),
    (["-o", "a.two", "--level", "1"], 2, "--level is not an option of the exporter 'two'"),
    (["-o", "a.two", "-d", "fp32"], 1, "exporter 'two' does not write models in fp32"),
    (["-o", "a.one", "--device", "cuda"], 1, "cuda"),
    (["-o", "."], 1, "is a folder"),
    (["-o", "nowhere/a.one"], 1, "there is no folder 'nowhere'"),
    (["-o", f"{'a' * 300}.one"], 1, "a name that is too long for this system"),
    (["-o", "a.one", "--level", "9"], 1, "nine is too much"),
    (["-o", "a.one", "--executor", "eager"], 2, "there is no option '--executor'"),
])
def test_what_cannot_be_written_is_told(arguments: list[str], code: int, words: str, torchchat: Any) -> None:
    done = torchchat("export", "embedded", *arguments)
    assert (done.code, words in done.err) == (code, True), done.err
    assert not list(Path.cwd().glob("a*"))


ALONE = EXPORTERS.replace('"two"', '"alone"').replace('".two"', '".alone"').replace(
    "options=OtherOptions", "stands_alone=True").replace('"one"', '"third"').replace('".one"', '".third"').replace(
    "--output-one-path", "--output-third-path")


@pytest.fixture
def dynamic_model(tmp_path: Path) -> Path:
    """The embedded model with 64 positions and dynamic rope scaling to 128."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "dynamic"))
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(("arguments", "fix"), [
    (["-o", "a.one"], "run the model itself"), (["-o", "a.alone"], "--max-seq-length 64"),
    (["-o", "a.alone", "--max-seq-length", "65"], "--max-seq-length 64"),
])
def test_dynamic_rope_beyond_the_original_context_is_not_exported(
        arguments: list[str], fix: str, dynamic_model: Path, make_plugin: Callable[..., Any], torchchat: Any) -> None:
    make_plugin(ALONE, "alone")
    done = torchchat("export", dynamic_model, *arguments)
    assert done.code == 1
    assert "rope scaling 'dynamic' changes its frequencies beyond 64 positions, which the exporter" in done.err
    assert f"try: {fix}" in done.err


def test_dynamic_rope_within_the_original_context_is_exported(dynamic_model: Path, make_plugin: Callable[..., Any],
                                                              torchchat: Any) -> None:
    make_plugin(ALONE, "alone")
    assert torchchat("export", dynamic_model, "-o", "a.alone", "--max-seq-length", "64").code == 0


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here in which nobody can write")
def test_a_folder_that_takes_no_files_is_told_before_the_model_is_loaded(torchchat: Any) -> None:
    done = torchchat("export", "no-such-model", "-o", "/proc/a.one")
    assert (done.code, "no file can be written into '/proc'" in done.err) == (1, True), done.err


def test_a_folder_that_may_not_be_looked_into_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", closed)  # nothing is closed to root
    with pytest.raises(TorchchatError, match=f"-o is .*; no file can be written into {str(tmp_path)!r}: Permission"):
        output_file("-o", str(tmp_path / "a.one"))


def test_what_is_no_ordinary_file_is_not_replaced(torchchat: Any) -> None:
    os.mkfifo("pipe.one")
    done = torchchat("export", "embedded", "-o", "pipe.one")
    assert (done.code, "is no ordinary file" in done.err, Path("pipe.one").is_fifo()) == (1, True, True)


def test_list_shows_what_was_exported_as_long_as_it_is_there(torchchat: Any) -> None:
    torchchat("export", "embedded", "-o", "a.one")
    rows = {row["name"]: row for row in json.loads(torchchat("list", "--json").out)}
    assert rows["embedded"]["products"] == [{"kind": "export", "path": str(Path("a.one").absolute()), "detail": "one"}]
    Path("a.one").unlink()
    rows = {row["name"]: row for row in json.loads(torchchat("list", "--json").out)}
    assert not rows["embedded"]["products"]


def test_the_help_has_the_flags_of_the_exporters(torchchat: Any) -> None:
    shown = torchchat("export", "--help").out
    assert "--output-one-path FILE" in shown
    assert "--level VALUE" in shown
    assert "--executor" not in shown
