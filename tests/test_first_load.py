"""A file that is new to this machine is loaded in a child process first, and recorded if it loads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from torchchat_core import first_load
from torchchat_core.artifacts import Artifact, Manifest, Target, open_artifact, write_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.first_load import remember, remember_export, try_first
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.testing.models import tiny_config

RUNTIME = '''
import os
import sys
from torchchat_core.artifacts import open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ExecutorInfo

class Session:
    def prefill(self, tokens): pass
    def decode(self, token):
        if self.word == "aborts later":
            print("Op index 7 out of range", file=sys.stderr, flush=True)
            os.abort()

class Executor:
    def load(self, request):
        self.word = open_artifact(request.artifact).manifest.runtime["word"]
        if self.word == "aborts":
            print("In function toInt(), assert failed", file=sys.stderr, flush=True)
            os.abort()
        if self.word == "raises":
            raise TorchchatError("a plain error")
        return self

    def session(self, limit=None):
        made = Session()
        made.word = self.word
        return made

    def close(self): pass

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name="fragile", summary="ends with its files", factory=__name__ + ":Executor",
                         reads=frozenset({"fragile"}), devices=frozenset({"cpu"}), dtypes=frozenset({"fp32"}))]
'''


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    folder = tmp_path / "plugin"
    info = folder / "fragile_runtime-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "fragile_runtime.py").write_text(RUNTIME)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchchat.v1]\nfragile = fragile_runtime\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_registry()


def artifact(tmp_path: Path, word: str, version: str = "1.0") -> Artifact:
    path = tmp_path / "m.pte"
    path.write_bytes(b"program")
    write_artifact(path, Manifest(kind="fragile", model="m", config=tiny_config(), dtype="fp32", max_seq_length=5,
                                  target=Target(device="cpu"), versions={"fragile-runtime": version},
                                  runtime={"word": word}))
    return open_artifact(path)


@pytest.mark.parametrize(("word", "last_words"), [("aborts", "In function toInt(), assert failed"),
                                                  ("aborts later", "Op index 7 out of range")])
def test_a_file_that_crashes_its_process_is_an_error_with_the_last_line_of_its_log(
        word: str, last_words: str, tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(TorchchatError, match=r"m\.pte cannot be loaded.*SIGABRT: ") as raised:
        try_first(artifact(tmp_path, word), "fragile", registry)
    assert raised.value.message.endswith(last_words)


def test_plain_errors_are_left_to_the_load_that_follows(tmp_path: Path, registry: Registry) -> None:
    try_first(artifact(tmp_path, "raises"), "fragile", registry)


def test_a_file_that_loaded_is_tried_again_only_if_it_or_its_runtime_changes(
        tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(first_load, "in_own_process", lambda _, arguments, *__, **___: tried.append(arguments["path"]))
    loaded = artifact(tmp_path, "loads")
    try_first(loaded, "fragile", registry)
    remember(loaded)
    try_first(loaded, "fragile", registry)
    assert len(tried) == 1
    try_first(artifact(tmp_path, "loads, too"), "fragile", registry)
    assert len(tried) == 2
    monkeypatch.setattr(first_load, "_installed_version", lambda _: "2.0")
    try_first(artifact(tmp_path, "loads"), "fragile", registry)
    assert len(tried) == 3


def test_a_file_that_was_exported_here_is_not_tried(tmp_path: Path, registry: Registry,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path, "aborts")
    remember_export(made.path)
    try_first(made, "fragile", registry)
    records = list((tmp_path / "cache" / "torchchat" / "loaded").iterdir())
    assert [stat.S_IMODE(record.stat().st_mode) for record in records] == [0o600]


@pytest.mark.skipif(os.name != "posix", reason="this system has no modes of files")
def test_a_record_that_others_could_have_written_does_not_count(tmp_path: Path, registry: Registry) -> None:
    made = artifact(tmp_path, "aborts")
    remember(made)
    next((tmp_path / "cache" / "torchchat" / "loaded").iterdir()).chmod(0o666)
    with pytest.raises(TorchchatError, match="SIGABRT"):
        try_first(made, "fragile", registry)
