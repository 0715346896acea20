"""Models of a hub, over HTTP from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from torchchat_core import builtins, progress
from torchchat_core.errors import TorchchatError
from torchchat_core.models.catalogue import STARTING_MODEL
from torchchat_core.plugins import CORE, Registry
from torchchat_core.sources import downloading, hub_fetching
from torchchat_core.sources import hub as hub_module
from torchchat_core.sources.hub import HubSource
from torchchat_core.sources.hub_cache import CachedRepository, hub_folder
from torchchat_core.specs import CatalogueEntry, ModelFiles, ModelRef
from torchchat_core.testing import ModelSourceContract

NAME = "someone/tiny"


def reference(text: str, token: str | None = None) -> ModelRef:
    return ModelRef(text=text, scheme="hf", location=text.removeprefix("hf:"), token=token)


def fetch(text: str = NAME, token: str | None = None) -> ModelFiles:
    return HubSource().fetch(reference(text, token))


def refused(text: str = NAME, token: str | None = None) -> TorchchatError:
    with pytest.raises(TorchchatError) as caught:
        fetch(text, token)
    return caught.value


def fetched(hub: Any) -> list[str]:
    """Paths in the repository of the files that were asked for."""
    return [line.split("/resolve/")[1].partition("/")[2] for line in hub.requests if "/resolve/" in line]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def tiny(hub: Any, repository: Callable[..., Any], tiny_files: Callable[[int], dict[str, bytes]]) -> dict[str, bytes]:
    """The files of the repository `NAME`."""
    files = tiny_files(0)
    hub.repositories[NAME] = repository(files)
    return files


class TestHub(ModelSourceContract):
    plugin, name = "torchchat_core.builtins", "hub"

    @pytest.fixture
    def references(self, hub: Any, tiny: dict[str, bytes], repository: Callable[..., Any],
                   tiny_files: Callable[[int], dict[str, bytes]]) -> Sequence[str]:
        hub.repositories["someone/other"] = repository(tiny_files(1))
        self._hub = hub
        return [f"hf:{NAME}", "hf:someone/other"]

    def bytes_fetched(self) -> int:
        return int(self._hub.bytes_sent)

    def interruption(self) -> AbstractContextManager[object]:
        size = sum(map(len, self._hub.repositories[NAME].files.values()))
        return self._hub.cut_after(int(size * 0.8))  # type: ignore[no-any-return]


# ---- fetching -----------------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_fetched_and_the_weights_come_last(hub: Any, tiny: dict[str, bytes]) -> None:
    files = fetch()
    assert set(fetched(hub)) == tiny.keys() - {"README.md"}
    assert fetched(hub)[-1] == "model.safetensors"
    assert files.weights[0].read_bytes() == tiny["model.safetensors"]
    assert files.digests["model.safetensors"] == hashlib.sha256(tiny["model.safetensors"]).hexdigest()
    assert files.root == CachedRepository(NAME).snapshot(str(files.revision))
    assert {path.name for path in files.tokenizer} == {"tokenizer.json"}


def test_the_exact_shards_of_an_index_are_fetched(hub: Any, tiny: dict[str, bytes]) -> None:
    weights = tiny.pop("model.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    tiny |= {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": weights + b"x",
             "model-00001-of-00003.safetensors": b"old", "model.safetensors.index.json": json.dumps(index).encode()}
    files = fetch()
    assert files.weights[0].name == "model.safetensors.index.json"
    assert {name for name in fetched(hub) if name.startswith("model")} == {
        "model.safetensors.index.json", *index["weight_map"].values()}
    (files.root / "model-00002-of-00002.safetensors").unlink()
    assert HubSource().locate(reference(NAME)) is None


def test_an_index_that_names_what_is_not_there_or_outside_is_refused(hub: Any, tiny: dict[str, bytes]) -> None:
    tiny["model.safetensors.index.json"] = b'{"weight_map": {"a": "nothing.safetensors"}}'
    assert "names 'nothing.safetensors', which someone/tiny does not hold" in refused().message
    tiny["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x"}}'
    assert "outside its own folder" in refused().message


def test_names_that_would_leave_the_cache_are_not_fetched(hub: Any, tiny: dict[str, bytes], tmp_path: Path) -> None:
    tiny["../../../../tokenizer.model"] = b"evil"
    tiny["original/../../tokenizer.model"] = b"evil"
    fetch()
    assert not list(tmp_path.rglob("tokenizer.model"))


def test_what_is_here_needs_no_network(hub: Any, tiny: dict[str, bytes]) -> None:
    first = fetch()
    count = len(hub.requests)
    assert fetch() == first == HubSource().locate(reference(NAME))
    assert len(hub.requests) == count


def test_a_revision_is_a_model_of_its_own(hub: Any, tiny: dict[str, bytes], tiny_files: Callable[..., Any]) -> None:
    hub.repositories[NAME].revisions["v1"] = tiny_files(3)
    main, tagged = fetch(), fetch(f"{NAME}@v1")
    assert main.root != tagged.root
    assert fetch(f"{NAME}@{tagged.revision}").root == tagged.root
    assert [model.reference for model in HubSource().kept()] == [f"hf:{NAME}", f"hf:{NAME}@v1"]
    blobs = set((CachedRepository(NAME).folder / "blobs").iterdir())
    before = tree_size(hub_folder())
    assert HubSource().remove(reference(f"{NAME}@v1")) == before - tree_size(hub_folder())
    left = set((CachedRepository(NAME).folder / "blobs").iterdir())
    assert len(blobs - left) == 1, "config and tokenizer are of the main branch too"
    assert HubSource().locate(reference(NAME)) == main
    assert HubSource().locate(reference(f"{NAME}@v1")) is None


def test_a_cut_connection_is_continued_at_once(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.budget, hub.cuts = sum(map(len, tiny.values())) - 20_000, 2
    assert fetch().weights[0].read_bytes() == tiny["model.safetensors"]
    assert len(hub.ranges) == 2
    assert hub.bytes_sent == sum(len(content) for name, content in tiny.items() if name != "README.md")


def test_a_connection_that_stays_cut_is_told_and_a_later_run_goes_on(hub: Any, tiny: dict[str, bytes]) -> None:
    needed = sum(len(content) for name, content in tiny.items() if name != "README.md")
    with hub.cut_after(needed - 10_000):
        error = refused()
    assert "the connection broke after" in error.message
    assert "what has come already is kept" in (error.fix or "")
    assert HubSource().locate(reference(NAME)) is None
    fetch()
    assert hub.bytes_sent == needed


def test_what_an_interrupted_run_left_can_be_removed(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.repositories[NAME].revisions["v1"] = {"a.gguf": bytes(50_000), "b.gguf": b""}
    for text in (NAME, f"{NAME}@v1:a.gguf"):
        with hub.cut_after(20_000):
            refused(text)
        before = tree_size(hub_folder())
        assert before > 20_000
        assert HubSource().remove(reference(text)) == before - tree_size(hub_folder())
        assert not list(hub_folder().rglob("*.incomplete"))


def test_an_error_before_anything_is_fetched_leaves_nothing(hub: Any, tiny: dict[str, bytes]) -> None:
    refused(f"{NAME}:nothing.gguf")
    assert not hub_folder().exists()


def test_a_damaged_file_is_deleted_and_named(hub: Any, tiny: dict[str, bytes]) -> None:
    for name, kind in (("model.safetensors", "sha256"), ("config.json", "git sha1")):
        hub.flip = name
        error = refused()
        assert f"{name} of {NAME} came damaged: its {kind} is" in error.message
        digest = hashlib.sha256(tiny[name]).hexdigest() if kind == "sha256" else git_sha1(tiny[name])
        assert not list(hub_folder().rglob(f"{digest}*"))[1:], "there is its lock alone"
        assert not list(hub_folder().rglob(f"snapshots/*/{name}"))
        hub.flip = None
        fetch()
        HubSource().remove(reference(NAME))


def test_progress_tells_of_every_file_and_of_all(hub: Any, tiny: dict[str, bytes]) -> None:
    reporter = Recorder()
    hub.budget, hub.cuts = 50_000, 1
    with progress.shown_by(reporter):
        fetch()
    needed = {name: len(content) for name, content in tiny.items() if name != "README.md"}
    assert reporter.done == {**needed, f"{NAME}: 4 files": sum(needed.values())}
    assert reporter.totals == reporter.done


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub: Any, tiny: dict[str, bytes],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage(10, 0, 10))
    message = refused().message
    assert f"{NAME} needs " in message
    assert "10 B free" in message
    assert hub.bytes_sent == 0


def test_content_that_is_here_already_is_linked_and_takes_no_room(hub: Any, tiny: dict[str, bytes],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fetch().weights[0].unlink()
    usage, sent = namedtuple("usage", "total used free"), hub.bytes_sent
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage(10, 10, 0))
    assert fetch().weights[0].read_bytes() == tiny["model.safetensors"]
    assert hub.bytes_sent == sent


def test_a_disk_that_fills_up_keeps_what_has_come(hub: Any, tiny: dict[str, bytes],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloading, "_read", full)
        error = refused()
    assert "No space left on device" in error.message
    assert "it goes on where it was" in (error.fix or "")
    fetch()


def test_an_interruption_keeps_the_partial_file(hub: Any, tiny: dict[str, bytes],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(futures: Any) -> Iterator[Any]:
        waited = threading.Event()
        while not list(hub_folder().rglob(f"{hashlib.sha256(tiny['model.safetensors']).hexdigest()}.incomplete")):
            if all(future.done() for future in futures):
                return real(futures)
            waited.wait(0.005)
        waited.wait(0.05)
        raise KeyboardInterrupt

    real, hub.delay = hub_fetching.as_completed, 0.005
    with monkeypatch.context() as patch:
        patch.setattr(hub_fetching, "as_completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    hub.delay = 0.0
    assert len(list(hub_folder().rglob("*.incomplete"))) == 1
    fetch()
    assert len(hub.ranges) == 1


def test_two_runs_at_once_fetch_every_file_once(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.delay = 0.002
    found: list[ModelFiles] = []
    threads = [threading.Thread(target=lambda: found.append(fetch())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert hub.bytes_sent == sum(len(content) for name, content in tiny.items() if name != "README.md")


def test_a_file_system_without_links_holds_the_files_themselves(hub: Any, tiny: dict[str, bytes],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", no_links)
    files = fetch()
    assert not files.weights[0].is_symlink()
    assert fetch() == files
    assert files.digests["config.json"]
    before = tree_size(hub_folder())
    assert HubSource().remove(reference(NAME)) == before - tree_size(hub_folder())


def test_files_too_large_for_plain_http_are_left_to_huggingface_hub(hub: Any, tiny: dict[str, bytes],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_fetching, "PLAIN_HTTP_LIMIT", len(tiny["model.safetensors"]) - 1)
    reporter = Recorder()
    with progress.shown_by(reporter):
        assert fetch().weights[0].read_bytes() == tiny["model.safetensors"]
    assert any(line.startswith("HEAD") for line in hub.requests), "huggingface_hub asks for the head first"
    assert reporter.done["model.safetensors"] == len(tiny["model.safetensors"])


class Recorder:
    """A `progress.Reporter` that adds up."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.totals: dict[str, int | None] = {}

    def started(self, name: str, total: int | None, unit: progress.Unit) -> Any:
        recorder = self
        recorder.done[name], recorder.totals[name] = 0, total

        class Task:
            def advance(self, amount: int) -> None:
                recorder.done[name] += amount

            def set_total(self, total: int | None) -> None:
                recorder.totals[name] = total

        return Task()

    def finished(self, task: Any, completed: bool) -> None: ...


def tree_size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_a_gated_repository_names_the_page_to_visit(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.repositories[NAME].gated = True
    hub.accounts = {"hf_without": set(), "hf_with": {NAME}}
    error = refused()
    assert "is gated" in error.message
    assert f"{hub.url}/{NAME}" in (error.fix or "")
    assert "--hf-token" in (error.fix or "")
    assert f"such as {STARTING_MODEL}" in (error.fix or "")
    error = refused(token="hf_without")
    assert "has no permission yet" in error.message
    assert f"{hub.url}/{NAME}" in (error.fix or "")
    hub.tokens.clear()
    assert fetch(token="hf_with").weights
    assert hub.tokens == [""], "the host that the hub redirects to does not get the token"


def test_the_token_comes_from_the_environment_too(hub: Any, tiny: dict[str, bytes],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].private = True
    hub.accounts = {"hf_with": {NAME}}
    monkeypatch.setenv("HF_TOKEN", "hf_with")
    assert fetch().weights


def test_a_wrong_token_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    assert "does not accept the token" in refused(token="hf_wrong").message


def test_an_unknown_repository_gets_near_matches_of_the_catalogue(hub: Any) -> None:
    assert "did you mean meta-llama/Llama-3.2-1B" in str(refused("meta-lama/Llama-3.2-1B"))
    assert "if it is private, give a token" in str(refused("no/such-thing"))


def test_an_unknown_revision_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    assert "has no revision 'v9'" in refused(f"{NAME}@v9").message


def test_an_unknown_file_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    assert "there is no file 'x.gguf'" in refused(f"{NAME}:x.gguf").message


def test_a_file_that_is_listed_and_not_there_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.refused["/config.json"] = 404
    assert "lists 'config.json', but the hub does not have it" in refused().message


def test_forbidden_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.refused["/api/"] = 403
    assert "forbids access" in refused().message


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("place", ["/api/", "config.json", "/lfs/"])
def test_a_busy_hub_is_asked_again(hub: Any, tiny: dict[str, bytes], status: int, place: str) -> None:
    hub.failures = [(place, status, {"Retry-After": "0"}), (place, status, {})]
    assert fetch().weights


def test_a_hub_that_stays_busy_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    hub.refused["/api/"] = 429
    assert "takes no more requests" in refused().message
    hub.refused["/api/"] = 503
    assert "is out of order (HTTP status 503)" in refused().message


def test_a_long_retry_after_is_told_and_not_waited_for(hub: Any, tiny: dict[str, bytes]) -> None:
    for header in ({"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}):
        hub.failures = [("/api/", 429, header)]
        assert "wait 3600 seconds" in (refused().fix or "")


def test_no_network_is_told(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused()
    assert "cannot fetch the list of files of someone/tiny from 127.0.0.1:9: " in error.message
    assert "check the network" in (error.fix or "")


def test_offline_forbids_the_network(hub: Any, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refused().message
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch().weights


# ---- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variables", "folder"), [
    ({"HF_HUB_CACHE": "/a/b"}, "/a/b"),
    ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
    ({"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/d"}, "/a"),
    ({"HF_HOME": "/d"}, "/d/hub"),
    ({"HF_HOME": "$BASE/d"}, "/base/d/hub"),
    ({"XDG_CACHE_HOME": "/e"}, "/e/huggingface/hub"),
    ({}, "/home/me/.cache/huggingface/hub"),
    ({"HF_HOME": "~/h"}, "/home/me/h/hub"),
])
def test_the_cache_is_where_hugging_faces_tools_have_it(variables: dict[str, str], folder: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "HOME": "/home/me", "BASE": "/base"}.items():
        monkeypatch.setenv(name, value)
    assert str(hub_folder()) == folder


def test_other_tools_find_what_was_fetched(hub: Any, tiny: dict[str, bytes]) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    files = fetch()
    assert try_to_load_from_cache(NAME, "model.safetensors", cache_dir=hub_folder()) == str(files.weights[0])
    cache = scan_cache_dir(hub_folder())
    assert [str(warning) for warning in cache.warnings] == []
    assert {repository.repo_id for repository in cache.repos} == {NAME}


def test_what_another_tool_fetched_is_found(hub: Any, tiny: dict[str, bytes]) -> None:
    from huggingface_hub import hf_hub_download

    def get(name: str) -> None:
        hf_hub_download(NAME, name, cache_dir=hub_folder(), endpoint=hub.url)

    get("model.safetensors")
    get("config.json")
    assert HubSource().locate(reference(NAME)) is None, "without a tokenizer it is not whole"
    get("tokenizer.json")
    found = HubSource().locate(reference(NAME))
    assert found is not None
    assert found.digests["model.safetensors"] == hashlib.sha256(tiny["model.safetensors"]).hexdigest()
    assert [model.reference for model in HubSource().kept()] == [f"hf:{NAME}"]


def test_one_gguf_file_of_another_tool_is_meant_by_its_name_alone(hub: Any, repository: Callable[..., Any]) -> None:
    from huggingface_hub import hf_hub_download

    hub.repositories[NAME] = repository({"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    hf_hub_download(NAME, "a.gguf", cache_dir=hub_folder(), endpoint=hub.url)
    assert HubSource().locate(reference(NAME)) is None
    assert HubSource().locate(reference(f"{NAME}:a.gguf")) is not None
    assert [(model.reference, model.bytes) for model in HubSource().kept()] == [(f"hf:{NAME}:a.gguf", 6)]
    assert "holds 2 models" in refused().message


def test_files_of_one_repository_are_kept_and_removed_apart(hub: Any, repository: Callable[..., Any]) -> None:
    hub.repositories[NAME] = repository({"a.gguf": b"GGUF a" * 100, "b.gguf": b"GGUF b" * 50, "README.md": b"r"})
    fetch(f"{NAME}:a.gguf")
    fetch(f"{NAME}:b.gguf")
    source = HubSource()
    assert [model.reference for model in source.kept()] == [f"hf:{NAME}:a.gguf", f"hf:{NAME}:b.gguf"]
    before = tree_size(hub_folder())
    assert source.remove(reference(f"{NAME}:a.gguf")) == 600 == before - tree_size(hub_folder())
    assert [model.reference for model in source.kept()] == [f"hf:{NAME}:b.gguf"]
    source.remove(reference(f"{NAME}:b.gguf"))
    assert not CachedRepository(NAME).folder.exists()


def test_a_damaged_cache_is_no_error(hub: Any, tiny: dict[str, bytes]) -> None:
    fetch()
    folder = hub_folder()
    for name in ("models--", "models--x", "models--a--b--c", "models--..--..", "datasets--a--b"):
        (folder / name / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "models--a--file").write_text("no folder")
    (folder / "models--a--b" / "refs").mkdir(parents=True)
    (folder / "models--a--b" / "refs" / "main").write_bytes(b"\xff../../..")
    snapshot = folder / "models--a--b" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.index.json").write_text("[" * 100_000)
    (snapshot / "loop").symlink_to("loop")
    record = CachedRepository("a/b").folder / ".torchchat"
    record.mkdir()
    (record / f"{'1' * 40}.json").write_text('{"files": [{"path": "../x", "size": "x"}]}')
    assert [model.reference for model in HubSource().kept()] == [f"hf:{NAME}"]
    assert HubSource().locate(reference("a/b")) is None


def test_a_truncated_file_is_fetched_again(hub: Any, tiny: dict[str, bytes]) -> None:
    blob = fetch().weights[0].resolve()
    blob.write_bytes(blob.read_bytes()[:100])
    assert HubSource().locate(reference(NAME)) is None
    assert fetch().weights[0].read_bytes() == tiny["model.safetensors"]


def test_removing_never_leaves_the_repositorys_folder(hub: Any, tiny: dict[str, bytes], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "blobs").mkdir(parents=True)
    (outside / "blobs" / ("0" * 40)).write_text("stays")
    files = fetch()
    (files.root / "link").symlink_to(outside)
    (files.root / "file").symlink_to(outside / "blobs" / ("0" * 40))
    HubSource().remove(reference(NAME))
    assert (outside / "blobs" / ("0" * 40)).read_text() == "stays"
    (hub_folder() / "models--someone--tiny").symlink_to(outside)
    with pytest.raises(TorchchatError, match="is a link to"):
        HubSource().remove(reference(NAME))
    assert (outside / "blobs" / ("0" * 40)).read_text() == "stays"


def test_removing_a_file_behind_a_linked_folder_is_refused(hub: Any, repository: Callable[..., Any],
                                                           tmp_path: Path) -> None:
    hub.repositories[NAME] = repository({"sub/a.gguf": b"GGUF a", "b.gguf": b"GGUF b"})
    fetch(f"{NAME}:b.gguf")
    snapshot = fetch(f"{NAME}:sub/a.gguf").weights[0].parent
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.gguf").write_bytes(b"GGUF a")
    (snapshot / "a.gguf").unlink()
    snapshot.rmdir()
    snapshot.symlink_to(tmp_path / "outside")
    with pytest.raises(TorchchatError, match="deletes nothing"):
        HubSource().remove(reference(f"{NAME}:sub/a.gguf"))
    assert (tmp_path / "outside" / "a.gguf").exists()


# ---- models of several places -------------------------------------------------------------------------------------


@pytest.fixture
def stories(hub: Any, repository: Callable[..., Any], llama2c_file: Callable[[int], bytes],
            monkeypatch: pytest.MonkeyPatch) -> list[CatalogueEntry]:
    """Two entries of a catalogue that share a tokenizer of another place."""
    hub.repositories["someone/stories"] = repository({"a.pt": llama2c_file(0), "b.pt": llama2c_file(1)})
    hub.plain["tokenizer.model"] = b"a tokenizer"
    tokenizer = f"{hub.url}/files/tokenizer.model#sha256={hashlib.sha256(b'a tokenizer').hexdigest()}"
    entries = [CatalogueEntry(alias=name, reference=f"hf:someone/stories:{name}.pt", files=(f"{name}.pt", tokenizer))
               for name in ("a", "b")]
    monkeypatch.setattr(hub_module, "load_catalogue", lambda: tuple(entries))
    return entries


def test_a_model_of_several_places_is_put_together(hub: Any, stories: list[CatalogueEntry], tmp_path: Path) -> None:
    files = fetch(stories[0].reference)
    assert files.weights == (files.root / "a.pt",)
    assert files.tokenizer == (files.root / "tokenizer.model",)
    assert files.root.is_relative_to(tmp_path / "cache" / "torchchat" / "models")
    assert files.revision == CachedRepository("someone/stories").commit(None)
    assert files.digests["a.pt"] == hashlib.sha256(files.weights[0].read_bytes()).hexdigest()
    count = len(hub.requests)
    assert fetch(stories[0].reference) == files
    assert len(hub.requests) == count
    assert [model.reference for model in HubSource().kept()] == [stories[0].reference]


def test_a_shared_part_stays_until_nothing_uses_it(hub: Any, stories: list[CatalogueEntry], tmp_path: Path) -> None:
    for entry in stories:
        fetch(entry.reference)
    source = HubSource()
    for entry in stories:
        before = tree_size(tmp_path)
        assert source.remove(reference(entry.reference)) == before - tree_size(tmp_path) > 0
        assert (source.locate(reference(stories[1].reference)) is None) == (entry is stories[1])
    assert tree_size(tmp_path) == 0


def test_a_part_that_is_not_what_the_catalogue_says_is_refused(hub: Any, stories: list[CatalogueEntry]) -> None:
    hub.plain["tokenizer.model"] = b"b tokenizer"
    assert "came damaged, or is another file" in refused(stories[0].reference).message
    assert HubSource().locate(reference(stories[0].reference)) is None


# ---- the command line ---------------------------------------------------------------------------------------------


@contextmanager
def stopped(hub: Any) -> Iterator[None]:
    """Within it nothing is answered."""
    hub.refused["/"] = 500
    count = len(hub.requests)
    yield
    assert len(hub.requests) == count


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "torchchat_core", *arguments], capture_output=True, text=True,
                          timeout=120, stdin=subprocess.DEVNULL)


def test_generate_fetches_a_model_and_runs_it_again_without_the_hub(hub: Any, tiny: dict[str, bytes]) -> None:
    command = ("generate", f"hf:{NAME}", "--prompt", "Hello", "--max-new-tokens", "4", "--json", "--temperature", "0")
    online = run(*command)
    assert online.returncode == 0, online.stderr
    with stopped(hub):
        offline = run(*command)
    assert json.loads(offline.stdout)["token_ids"] == json.loads(online.stdout)["token_ids"]


LOCATE = """
import sys
from torchchat_core.sources.hub import HubSource
from torchchat_core.specs import ModelRef
found = HubSource().locate(ModelRef(text="x", scheme="hf", location=sys.argv[1]))
kept = list(HubSource().kept())
heavy = sorted({"huggingface_hub", "torch", "httpx2", "urllib.request", "ssl"} & set(sys.modules))
print(found is not None, len(kept), heavy)
"""


def test_finding_a_model_imports_nothing_heavy(hub: Any, tiny: dict[str, bytes]) -> None:
    fetch()
    found = subprocess.run([sys.executable, "-c", LOCATE, NAME], capture_output=True, text=True, check=True)
    assert found.stdout.split(maxsplit=2) == ["True", "1", "[]\n"]


def test_the_registry_has_both_sources() -> None:
    registry = Registry()
    registry.add(builtins, "builtins", CORE)
    assert registry.claim("schemes", "hf").name == "hub"
    assert registry.claim("schemes", "https").name == registry.claim("schemes", "http").name == "url"


def test_manually_placed_files_are_used_and_kept(hub: Any, stories: list[CatalogueEntry], tmp_path: Path
                                                 ) -> None:
    folder = tmp_path / "cache/torchchat/models/someone--stories--a.pt"
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"placed by hand")
    del hub.plain["tokenizer.model"]
    files = fetch(stories[0].reference)
    assert (files.root / "tokenizer.model").read_bytes() == b"placed by hand"
    assert files.weights == (folder / "a.pt",)


def test_a_missing_part_is_named_with_its_folder(
        hub: Any, stories: list[CatalogueEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache/torchchat/models/someone--stories--a.pt"
    fetch(stories[1].reference)  # the hub's cache and the folder of parts have files for both
    shutil.rmtree(tmp_path / "cache/torchchat/parts")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(stories[0].reference)
    assert "(missing: a.pt, tokenizer.model)" in error.message
    assert f"put a.pt and tokenizer.model into {folder}" in (error.fix or "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    del hub.plain["tokenizer.model"]
    error = refused(stories[0].reference)
    assert "missing of a: a.pt, tokenizer.model" in error.message
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"placed by hand")
    fetch(stories[0].reference)
    (folder / "a.pt").unlink()  # it stays in the hub's cache
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(hub.requests)
    assert fetch(stories[0].reference).weights == (folder / "a.pt",)
    assert len(hub.requests) == count
