"""Models of a hub after their branch has moved on, and what is deleted with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.sources.hub import HubSource
from torchchat_core.sources.hub_cache import CachedRepository, hub_folder
from torchchat_core.specs import ModelFiles, ModelRef

NAME = "someone/tiny"


def reference(text: str) -> ModelRef:
    return ModelRef(text=text, scheme="hf", location=text.removeprefix("hf:"))


def fetch(text: str) -> ModelFiles:
    return HubSource().fetch(reference(text))


def is_here(text: str) -> bool:
    return HubSource().locate(reference(text)) is not None


def kept() -> list[str]:
    return [model.reference for model in HubSource().kept()]


def goes_with(text: str) -> tuple[list[str], int] | None:
    """References and bytes."""
    found = HubSource().removal(reference(text))
    return None if found is None else ([model.reference for model in found.models], found.bytes)


def size_of_files(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def size_of_blobs() -> int:
    return size_of_files(CachedRepository(NAME).folder / "blobs")


@pytest.fixture
def ggufs(hub: Any, repository: Callable[..., Any]) -> dict[str, bytes]:
    """The files of the repository `NAME`: two models of a file each."""
    files = {"a.gguf": b"GGUF a" * 100, "b.gguf": b"GGUF b" * 50, "README.md": b"first"}
    hub.repositories[NAME] = repository(files)
    return files


# ---- a branch that moves ------------------------------------------------------------------------------------------


def test_a_model_stays_here_when_its_branch_moves_on(hub: Any, ggufs: dict[str, bytes],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(f"{NAME}:a.gguf")
    ggufs["README.md"] = b"second"
    second = fetch(f"{NAME}:b.gguf")
    assert first.revision != second.revision
    assert kept() == [f"hf:{NAME}:a.gguf", f"hf:{NAME}:b.gguf"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(f"{NAME}:a.gguf") == first
    assert fetch(f"{NAME}:b.gguf") == second


def test_a_whole_model_of_another_tool_stays_here_when_a_file_is_fetched(
        hub: Any, repository: Callable[..., Any], tiny_files: Callable[[int], dict[str, bytes]]) -> None:
    from huggingface_hub import hf_hub_download

    files = tiny_files(0)
    hub.repositories[NAME] = repository(files)
    for name in files:
        hf_hub_download(NAME, name, cache_dir=hub_folder(), endpoint=hub.url)
    files["x.gguf"] = b"GGUF"
    fetch(f"{NAME}:x.gguf")
    assert is_here(NAME)
    assert kept() == [f"hf:{NAME}", f"hf:{NAME}:x.gguf"]


def test_a_fetch_that_fails_moves_no_branch(hub: Any, ggufs: dict[str, bytes]) -> None:
    first = fetch(f"{NAME}:a.gguf")
    ggufs["README.md"] = b"second"
    hub.refused["/resolve/"] = 403
    with pytest.raises(TorchchatError, match="forbids access"):
        fetch(f"{NAME}:b.gguf")
    assert CachedRepository(NAME).commit(None) == first.revision
    assert fetch(f"{NAME}:a.gguf") == first


def test_the_newest_state_of_a_branch_that_is_here_is_taken(hub: Any, ggufs: dict[str, bytes]) -> None:
    states = []
    for readme in (b"1", b"2", b"3"):
        ggufs |= {"README.md": readme, f"{readme.decode()}.gguf": b"GGUF"}
        states.append(fetch(f"{NAME}:{readme.decode()}.gguf").revision)
        if readme != b"3":
            fetch(f"{NAME}@{states[-1]}:a.gguf")
    found = HubSource().locate(reference(f"{NAME}:a.gguf"))
    assert found is not None
    assert found.revision == states[1]


def test_a_commit_that_was_named_is_not_the_branchs(hub: Any, ggufs: dict[str, bytes]) -> None:
    hub.repositories[NAME].revisions["v1"] = {**ggufs, "README.md": b"tagged"}
    commit = hub.repositories[NAME].at("v1")[0]
    fetch(f"{NAME}@{commit}:a.gguf")
    assert not is_here(f"{NAME}:a.gguf")
    assert kept() == [f"hf:{NAME}@{commit}:a.gguf"]


# ---- what goes together -------------------------------------------------------------------------------------------


def test_a_repositorys_removal_names_all_its_revisions_and_their_bytes(
        hub: Any, repository: Callable[..., Any], tiny_files: Callable[[int], dict[str, bytes]]) -> None:
    hub.repositories[NAME] = repository(tiny_files(0), revisions={"v2": tiny_files(3)})
    fetch(NAME)
    fetch(f"{NAME}@v2")
    models, freed = goes_with(NAME) or ([], 0)
    assert models == [f"hf:{NAME}", f"hf:{NAME}@v2"]
    found = HubSource().removal(reference(NAME))
    assert found is not None
    assert found.path == CachedRepository(NAME).folder
    before = size_of_files(found.path)
    assert freed == before == HubSource().remove(reference(NAME))


def test_a_revisions_removal_names_it_alone(hub: Any, repository: Callable[..., Any],
                                            tiny_files: Callable[[int], dict[str, bytes]]) -> None:
    hub.repositories[NAME] = repository(tiny_files(0), revisions={"v2": tiny_files(3)})
    fetch(NAME)
    fetch(f"{NAME}@v2")
    before = size_of_blobs()
    assert goes_with(f"{NAME}@v2") == ([f"hf:{NAME}@v2"], len(tiny_files(3)["model.safetensors"]))
    HubSource().remove(reference(f"{NAME}@v2"))
    assert before - size_of_blobs() == len(tiny_files(3)["model.safetensors"])
    assert kept() == [f"hf:{NAME}"]


def test_the_removal_of_several_single_files_names_each(hub: Any, ggufs: dict[str, bytes]) -> None:
    fetch(f"{NAME}:a.gguf")
    fetch(f"{NAME}:b.gguf")
    assert (goes_with(NAME) or ([], 0))[0] == [f"hf:{NAME}:a.gguf", f"hf:{NAME}:b.gguf"]
    assert goes_with(f"{NAME}:a.gguf") == ([f"hf:{NAME}:a.gguf"], 600)
    assert HubSource().remove(reference(f"{NAME}:a.gguf")) == 600
    assert kept() == [f"hf:{NAME}:b.gguf"]


def test_a_file_of_an_earlier_state_is_removed_by_its_name(hub: Any, ggufs: dict[str, bytes]) -> None:
    fetch(f"{NAME}:a.gguf")
    ggufs["README.md"] = b"second"
    fetch(f"{NAME}:b.gguf")
    assert goes_with(f"{NAME}:a.gguf") == ([f"hf:{NAME}:a.gguf"], 600)
    HubSource().remove(reference(f"{NAME}:a.gguf"))
    assert kept() == [f"hf:{NAME}:b.gguf"]
    assert size_of_blobs() == 300


def test_a_download_that_was_cut_off_is_no_model_and_its_bytes_are_named(hub: Any, ggufs: dict[str, bytes]) -> None:
    assert goes_with(NAME) is None
    assert goes_with(f"{NAME}:a.gguf") is None
    ggufs["big.gguf"] = os.urandom(50_000)
    fetch(f"{NAME}:a.gguf")
    assert goes_with(f"{NAME}:big.gguf") is None
    with hub.cut_after(20_000), pytest.raises(TorchchatError):
        fetch(f"{NAME}:big.gguf")
    assert goes_with(f"{NAME}:big.gguf") == ([], 20_000)
    assert HubSource().remove(reference(f"{NAME}:big.gguf")) == 20_000
    assert kept() == [f"hf:{NAME}:a.gguf"]


def test_every_snapshot_is_looked_at_once_for_the_list(hub: Any, ggufs: dict[str, bytes],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(f"{NAME}:a.gguf")
    fetch(f"{NAME}:b.gguf")
    calls: list[str] = []

    def count(name: str) -> None:
        real = getattr(CachedRepository, name)
        monkeypatch.setattr(CachedRepository, name, lambda self, commit: (calls.append(name), real(self, commit))[1])

    count("local_sizes")
    count("listing")
    assert len(kept()) == 2
    assert sorted(calls) == ["listing", "local_sizes"]
