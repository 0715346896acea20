"""The source contract finds each kind of fault. This file is also the plugin that offers the faulty sources."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.sources.checkpoints import open_checkpoint
from torchchat_core.specs import Checkpoint, KeptModel, ModelFiles, ModelRef, ModelSourceInfo
from torchchat_core.testing import ModelSourceContract
from torchchat_core.testing.models import TINY, seeded, tiny_config

CONFIG = {"model_type": "llama", "vocab_size": TINY["vocab_size"], "hidden_size": TINY["hidden_size"],
          "intermediate_size": TINY["intermediate_size"], "num_hidden_layers": TINY["num_layers"],
          "num_attention_heads": TINY["num_heads"], "num_key_value_heads": TINY["num_kv_heads"],
          "max_position_embeddings": TINY["max_context"]}
BLOCK = 4096


class Origin:
    """Where models are fetched from: folders, counted, and cut off after so many bytes where a test asks for it."""

    sent = 0
    left: int | None = None

    def read(self, path: Path, start: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                if self.left is not None:
                    self.left -= len(block)
                    if self.left < 0:
                        raise ConnectionError("the cable was pulled")
                self.sent += len(block)
                yield block


ORIGIN = Origin()


class Right:
    """A source that keeps copies, without a fault."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        there, here = self.places(ref)
        if ref.scheme != "mirror" or not ref.location or not there.is_dir():
            raise TorchchatError(f"there is no model {ref.location!r}")
        here.mkdir(parents=True, exist_ok=True)
        for path in sorted(there.iterdir()):
            if not (here / path.name).exists():
                self.copy(path, here / path.name)
        return self.files(ref, here)

    def files(self, ref: ModelRef, here: Path) -> ModelFiles:
        return ModelFiles(ref=ref, format="mirrored", root=here, weights=(here / "model.safetensors",),
                          config=here / "config.json")

    def copy(self, path: Path, kept: Path) -> None:
        part = kept.with_suffix(".part")
        with part.open("ab") as file:
            for block in ORIGIN.read(path, part.stat().st_size):
                file.write(block)
        part.rename(kept)

    def places(self, ref: ModelRef) -> tuple[Path, Path]:
        return Path(os.environ["MIRROR_ORIGIN"]) / ref.location, Path(os.environ["MIRROR_CACHE"]) / ref.location

    def open(self, files: ModelFiles) -> Checkpoint:
        return open_checkpoint(replace(files, format="safetensors"))

    def locate(self, ref: ModelRef) -> ModelFiles | None:
        _, here = self.places(ref)
        whole = all((here / name).is_file() for name in ("config.json", "model.safetensors"))
        return self.files(ref, here) if whole else None

    def kept(self) -> list[KeptModel]:
        cache = Path(os.environ["MIRROR_CACHE"])
        names = sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []
        return [KeptModel(reference=f"mirror:{name}", path=cache / name, bytes=size_of(cache / name)) for name in names
                if self.locate(ModelRef(text=name, scheme="mirror", location=name)) is not None]

    def remove(self, ref: ModelRef) -> int:
        _, here = self.places(ref)
        freed = size_of(here)
        shutil.rmtree(here, ignore_errors=True)
        return freed


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


class Wrapped:
    """A checkpoint whose faults are those of a subclass."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

    def names(self) -> Any:
        return self.inner.names()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.inner.tensor(name, dtype)


class NamesWhatIsNotThere(Right):
    def fetch(self, ref: ModelRef) -> ModelFiles:
        files = super().fetch(ref)
        return replace(files, tokenizer=(files.root / "tokenizer.json",))


class RootElsewhere(Right):
    def fetch(self, ref: ModelRef) -> ModelFiles:
        files = super().fetch(ref)
        return replace(files, root=files.root / "snapshot")


class NoWeights(Right):
    def fetch(self, ref: ModelRef) -> ModelFiles:
        return replace(super().fetch(ref), weights=())


class AnotherReference(Right):
    def fetch(self, ref: ModelRef) -> ModelFiles:
        return replace(super().fetch(ref), ref=replace(ref, text="mine"))


class Moves(Right):
    calls = itertools.count()

    def fetch(self, ref: ModelRef) -> ModelFiles:
        return replace(super().fetch(ref), revision=str(next(self.calls)))


class GivesTheDefault(Right):
    def fetch(self, ref: ModelRef) -> ModelFiles:
        there, _ = self.places(ref)
        return super().fetch(ref if there.is_dir() and ref.location else replace(ref, location="small"))


class FailsWithFileNotFound(Right):
    def places(self, ref: ModelRef) -> tuple[Path, Path]:
        there, here = super().places(ref)
        there.stat()
        return there, here


class LosesATensor(Right):
    class Checkpoint(Wrapped):
        def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            if name == "model.norm.weight":
                raise KeyError(name)
            return super().tensor(name, dtype)

    def open(self, files: ModelFiles) -> Checkpoint:
        return self.Checkpoint(super().open(files))


class TransposesTensors(LosesATensor):
    class Checkpoint(Wrapped):
        def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            return super().tensor(name, dtype).t()


class LendsTensors(LosesATensor):
    class Checkpoint(Wrapped):
        calls = itertools.count()

        def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            return super().tensor(name, dtype) + next(self.calls)


class NoSuchTensorIsNone(LosesATensor):
    class Checkpoint(Wrapped):
        def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            return super().tensor(name, dtype) if name in self.names() else None


class NoSuchTensorIsAnError(LosesATensor):
    class Checkpoint(Wrapped):
        def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            if name not in self.names():
                raise TorchchatError(f"no tensor {name}")
            return super().tensor(name, dtype)


class FetchesAlways(Right):
    def fetch(self, ref: ModelRef) -> ModelFiles:
        self.remove(ref)
        return super().fetch(ref)


class BeginsAgain(Right):
    def copy(self, path: Path, kept: Path) -> None:
        kept.with_suffix(".part").unlink(missing_ok=True)
        super().copy(path, kept)


class AppendsTheWhole(Right):
    def copy(self, path: Path, kept: Path) -> None:
        with kept.with_suffix(".part").open("ab") as file:
            for block in ORIGIN.read(path, 0):
                file.write(block)
        kept.with_suffix(".part").rename(kept)


class TakesPartsForWholes(Right):
    def copy(self, path: Path, kept: Path) -> None:
        with kept.open("wb") as file:
            for block in ORIGIN.read(path, 0):
                file.write(block)


class RemovesAll(Right):
    def remove(self, ref: ModelRef) -> int:
        freed = super().remove(ref)
        shutil.rmtree(os.environ["MIRROR_CACHE"], ignore_errors=True)
        return freed


class RemovesNothing(Right):
    def remove(self, ref: ModelRef) -> int:
        return 0


class RoundsBytes(Right):
    def remove(self, ref: ModelRef) -> int:
        return super().remove(ref) // 4096 * 4096


class SaysItAgain(Right):
    freed = 0

    def remove(self, ref: ModelRef) -> int:
        type(self).freed = super().remove(ref) or self.freed
        return self.freed


class LocatesByFetching(Right):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        return self.fetch(ref)


class LocatesByFetchingAgain(FetchesAlways):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        return self.fetch(ref) if super().locate(ref) else None


class LooksItUpFirst(Right):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        there, _ = self.places(ref)
        list(ORIGIN.read(there / "config.json", 0))
        return super().locate(ref)


class LocatesNothing(Right):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        return None


class LocatesAnotherReference(Right):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        located = super().locate(ref)
        return located and replace(located, ref=replace(ref, text="mine"))


class LocatesParts(Right):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        _, here = self.places(ref)
        return self.files(ref, here) if here.is_dir() else None


class TrustsTheConfiguration(Right):
    def locate(self, ref: ModelRef) -> ModelFiles | None:
        _, here = self.places(ref)
        parts = list(here.glob("*.part"))
        return self.files(ref, here) if (here / "config.json").is_file() and not parts else None


class ListsParts(Right):
    def kept(self) -> list[KeptModel]:
        cache = Path(os.environ["MIRROR_CACHE"])
        paths = cache.iterdir() if cache.is_dir() else []
        return [KeptModel(reference=f"mirror:{path.name}", path=path, bytes=size_of(path)) for path in paths]


class ListsOne(Right):
    def kept(self) -> list[KeptModel]:
        return super().kept()[:1]


class ListsTwice(Right):
    def kept(self) -> list[KeptModel]:
        return super().kept() * 2


class ListsAnotherName(Right):
    def kept(self) -> list[KeptModel]:
        return [replace(copy, reference=f"mirror:{copy.path}-1") for copy in super().kept()]


class ListsAnotherPath(Right):
    def kept(self) -> list[KeptModel]:
        return [replace(copy, path=copy.path / "snapshot") for copy in super().kept()]


class ListsTooMuch(Right):
    def kept(self) -> list[KeptModel]:
        return [replace(copy, bytes=copy.bytes + 1) for copy in super().kept()]


class ListsWeightsAlone(Right):
    def kept(self) -> list[KeptModel]:
        return [replace(copy, bytes=(copy.path / "model.safetensors").stat().st_size) for copy in super().kept()]


TABLE = [
    (NamesWhatIsNotThere, "test_a_reference_becomes_files", "tokenizer.json does not exist"),
    (RootElsewhere, "test_a_reference_becomes_files", "is outside"),
    (NoWeights, "test_a_reference_becomes_files", "and the weights ()"),
    (AnotherReference, "test_a_reference_becomes_files", "are said to be of"),
    (Moves, "test_fetching_again_gives_the_same_files", "revision='1'"),
    (GivesTheDefault, "test_foreign_references_are_refused", "mirror:no/such-model, which does not exist, was"),
    (FailsWithFileNotFound, "test_foreign_references_are_refused", "raised FileNotFoundError"),
    (LosesATensor, "test_the_files_are_a_model", "no tensor 'model.norm.weight'"),
    (TransposesTensors, "test_the_files_are_a_model", "has the shape [32, 96]"),
    (LendsTensors, "test_reading_twice_gives_equal_tensors", "is another tensor when it is read again"),
    (NoSuchTensorIsNone, "test_an_unknown_tensor_is_a_key_error", "gives one"),
    (NoSuchTensorIsAnError, "test_an_unknown_tensor_is_a_key_error", "raises TorchchatError"),
    (LocatesByFetching, "test_what_is_here_is_located", "before it is fetched, 'mirror:small' is located at"),
    (LooksItUpFirst, "test_what_is_here_is_located", "locate() fetched"),
    (LocatesByFetchingAgain, "test_what_is_here_is_located", "locate() fetched"),
    (LocatesNothing, "test_what_is_here_is_located", "and locate() then None"),
    (LocatesAnotherReference, "test_what_is_here_is_located", "and locate() then ModelFiles(ref=ModelRef(text='mine'"),
    (LocatesParts, "test_part_of_a_model_is_not_located", "after an interrupted fetch, locate() returns"),
    (ListsParts, "test_part_of_a_model_is_not_located", "after an interrupted fetch, kept() lists"),
    (TrustsTheConfiguration, "test_part_of_a_model_is_not_located", "after a file of its weights was deleted"),
    (ListsOne, "test_kept_models_are_listed", "after two models were fetched, kept() lists"),
    (ListsTwice, "test_kept_models_are_listed", "after two models were fetched, kept() lists"),
    (ListsAnotherName, "test_kept_models_are_listed", "after two models were fetched, kept() lists"),
    (ListsAnotherPath, "test_kept_models_are_listed", "holds none of its files"),
    (ListsWeightsAlone, "test_kept_models_are_listed", "bytes; its files have"),
    (ListsTooMuch, "test_kept_models_are_listed", "and remove() freed"),
    (FetchesAlways, "test_what_is_kept_is_not_fetched_again", "the second fetch of 'mirror:small' fetched"),
    (BeginsAgain, "test_an_interrupted_fetch_goes_on", "bytes were fetched for a model of"),
    (AppendsTheWhole, "test_an_interrupted_fetch_goes_on", "the files have other contents"),
    (TakesPartsForWholes, "test_an_interrupted_fetch_goes_on", "the files have other contents"),
    (RemovesAll, "test_removing_deletes_what_was_kept_and_nothing_else", "remove() also deleted"),
    (RemovesNothing, "test_removing_deletes_what_was_kept_and_nothing_else", "is still there after remove()"),
    (RoundsBytes, "test_removing_deletes_what_was_kept_and_nothing_else", "bytes became free;"),
    (SaysItAgain, "test_removing_twice_frees_nothing_more", "remove() a second time says that"),
]


@hookimpl
def torchchat_model_sources() -> list[ModelSourceInfo]:
    return [ModelSourceInfo(name=source.__name__.lower(), summary="faulty", factory=f"{__name__}:{source.__name__}",
                            schemes=frozenset({"mirror"}), formats=frozenset({"mirrored"}), keeps=True)
            for source in {Right, *(row[0] for row in TABLE)}]


class MirrorContract(ModelSourceContract):
    plugin, name = __name__, "right"

    @pytest.fixture
    def references(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
        monkeypatch.setenv("MIRROR_ORIGIN", str(tmp_path / "origin"))
        monkeypatch.setenv("MIRROR_CACHE", str(tmp_path / "cache"))
        for seed, name in enumerate(("small", "other")):
            folder = tmp_path / "origin" / name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(CONFIG))
            save_file(seeded(tiny_config(), seed).state_dict(), folder / "model.safetensors")
        return ["mirror:small", "mirror:other"]

    def bytes_fetched(self) -> int:
        return ORIGIN.sent

    @contextmanager
    def interruption(self) -> Iterator[None]:
        ORIGIN.left = 60_000
        yield
        ORIGIN.left = None


class TestRight(MirrorContract):
    pass


def contract(source: type[Right]) -> type[ModelSourceContract]:
    """The contract of one of the sources, as a test class of this module."""
    name = f"Contract{source.__name__}"
    globals()[name] = type(name, (MirrorContract,), {"name": source.__name__.lower(), "__module__": __name__})
    return globals()[name]


FAULTS = [(contract(source), test, words) for source, test, words in TABLE]


@pytest.mark.parametrize(("contract", "test", "words"), FAULTS)
def test_the_fault_is_found(contract: type, test: str, words: str, failures: Mapping[tuple[str, str], str]) -> None:
    assert words in failures[contract.__name__, test]


def test_every_demand_has_a_fault() -> None:
    assert {name for name in dir(ModelSourceContract) if name.startswith("test_")} == {test for _, test, _ in FAULTS}
