"""The contract of a model source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.models.weights import build_model
from torchchat_core.sources.reference import resolve
from torchchat_core.specs import Checkpoint, KeptModel, ModelFiles, ModelRef, ModelSource, ModelSourceInfo
from torchchat_core.testing.demands import demand, demand_none, described, refusal, registry_with

ELSEWHERE = "no/such-model"


class ModelSourceContract:
    """A source finds the files of its references, refuses others, and reads what it says it reads.

        class TestSource(ModelSourceContract):
            plugin, name = "my_plugin", "mine"

            @pytest.fixture
            def references(self, tmp_path, monkeypatch):
                monkeypatch.setenv("MY_CACHE", str(tmp_path / "cache"))
                return ["mine:tiny-model"]

    A source that keeps copies (`keeps=True`) is given two references, keeps its copies under `tmp_path`, and
    overrides `bytes_fetched` and `interruption`. Models should be tiny: they are built.
    """

    plugin: str  # the module that the entry point names
    name: str  # of the source
    refetched: float = 0.25  # of a model, the share that may be fetched twice after an interruption

    @pytest.fixture
    def references(self) -> Sequence[str]:
        """What a user types for a model of this source; two different models where the source keeps copies."""
        raise NotImplementedError("override the fixture `references` in the subclass of ModelSourceContract")

    def bytes_fetched(self) -> int:
        """Bytes that have been fetched in all, counted where they come from, such as a server of the test."""
        raise NotImplementedError("override bytes_fetched(): the source declares keeps=True")

    def interruption(self) -> AbstractContextManager[object]:
        """Within it a fetch is cut off, by whatever error, after more than the share `refetched` of the model."""
        raise NotImplementedError("override interruption(): the source declares keeps=True")

    # ---- finding --------------------------------------------------------------------------------------------------

    def test_a_reference_becomes_files(self, references: Sequence[str]) -> None:
        """All that later stages read is on this machine, in the model's own folder."""
        files = self._fetch(references[0])
        paths = _paths(files)
        demand(files.weights and files.format, f"{references[0]!r} has the format {files.format!r} and the weights "
               f"{files.weights}", "name the format, and at least one file of weights")
        demand_none([f"{path} does not exist" for path in paths if not path.is_file()],
                    "list only files that were fetched")
        demand_none([f"{path} is outside {files.root}" for path in paths if not path.is_relative_to(files.root)],
                    "let `root` be the folder that holds all of the model's files")
        demand(files.ref == self._resolve(references[0]), f"the files are said to be of {files.ref}",
               "set `ref` to the reference that was given")

    def test_fetching_again_gives_the_same_files(self, references: Sequence[str]) -> None:
        """Whoever has read one of them may read the others later."""
        first, second = self._fetch(references[0]), self._fetch(references[0])
        demand(first == second, f"fetched twice, {references[0]!r} is {first} and then {second}",
               "return the files in a fixed order, and leave them where they are")

    @pytest.mark.usefixtures("references")
    def test_foreign_references_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is not there is told as such: nothing else may be given instead, and no other error comes out."""
        if not self.info.schemes:
            pytest.skip("the source only opens what others find")
        empty = tmp_path / "empty"
        empty.mkdir()
        monkeypatch.chdir(empty)
        for scheme in sorted(self.info.schemes):
            for text in (ELSEWHERE, ""):
                with refusal(f"fetching {scheme}:{text}, which does not exist,"):
                    self._source.fetch(ModelRef(text=f"{scheme}:{text}", scheme=scheme, location=text))
        with refusal(f"fetching a reference of the foreign scheme 'elsewhere:{ELSEWHERE}'"):
            self._source.fetch(ModelRef(text=f"elsewhere:{ELSEWHERE}", scheme="elsewhere", location=ELSEWHERE))

    # ---- reading --------------------------------------------------------------------------------------------------

    def test_the_files_are_a_model(self, references: Sequence[str]) -> None:
        """Every tensor that the configuration asks for is there, has its shape, and no other one is left over."""
        checkpoint = self._open(references[0])
        try:
            build_model(checkpoint, torch.float32)
        except TorchchatError as error:
            demand(False, f"the model of {references[0]!r} cannot be built: {error}",
                   "give tensors by Hugging Face's Llama names, with the shapes that `config` asks for")

    def test_reading_twice_gives_equal_tensors(self, references: Sequence[str]) -> None:
        """Tensors are read when asked for, by whom and how often is not the source's business."""
        first, second = self._open(references[0]), self._open(references[0])
        for name in first.names():
            tensors = [first.tensor(name), first.tensor(name), second.tensor(name)]
            same = all(torch.equal(tensors[0], other) and tensors[0].dtype == other.dtype for other in tensors[1:])
            demand(same, f"{name} is another tensor when it is read again",
                   "read from the file each time, or give out what nobody can change")

    def test_an_unknown_tensor_is_a_key_error(self, references: Sequence[str]) -> None:
        """It is how core finds out that a checkpoint is incomplete."""
        checkpoint = self._open(references[0])
        try:
            checkpoint.tensor("no.such.tensor")
        except KeyError:
            return
        except Exception as error:
            demand(False, f"asking for a tensor that is not there raises {type(error).__name__}", "raise KeyError")
        demand(False, "asking for a tensor that is not there gives one", "raise KeyError")

    # ---- keeping --------------------------------------------------------------------------------------------------

    def test_what_is_here_is_located(self, references: Sequence[str]) -> None:
        """`torchchat list` and `torchchat where` ask for many models, and none of them may be fetched for that."""
        self._needs_keeping()
        reference, before = self._resolve(references[0]), self.bytes_fetched()
        early = self._source.locate(reference)
        demand(early is None, f"before it is fetched, {references[0]!r} is located at {early}",
               "return None from locate() where nothing is kept")
        asked = self.bytes_fetched() - before
        demand(asked == 0, f"locate() fetched {asked} bytes", "look only at what is kept")
        fetched, before = self._fetch(references[0]), self.bytes_fetched()
        located = self._source.locate(reference)
        demand(located == fetched, f"fetch() returned {fetched}, and locate() then {located}",
               "let fetch() return what locate() finds in the end")
        asked = self.bytes_fetched() - before
        demand(asked == 0, f"locate() fetched {asked} bytes", "look only at what is kept")

    def test_part_of_a_model_is_not_located(self, references: Sequence[str]) -> None:
        """What a broken fetch left, or what has lost a file, would fail in the middle of whoever opens it."""
        self._needs_keeping()
        reference = self._resolve(references[0])
        self._cut_off(references[0])
        self._demand_nothing_whole(reference, "after an interrupted fetch")
        self._fetch(references[0]).weights[0].unlink()
        self._demand_nothing_whole(reference, "after a file of its weights was deleted")
        files = self._fetch(references[0])
        demand(files.weights[0].is_file(), f"a fetch does not bring back {files.weights[0]}, which was deleted",
               "look for every file before a copy counts as whole")

    def test_kept_models_are_listed(self, references: Sequence[str]) -> None:
        """`torchchat list` shows what takes disk space, and by which reference it is to be removed."""
        self._needs_keeping()
        demand(len(references) > 1, "there is only one reference", "let `references` give two different models")
        self._demand_kept([], "before anything was fetched")
        files = [self._fetch(reference) for reference in references[:2]]
        self._demand_kept(files, "after two models were fetched")
        copy = next(copy for copy in self._source.kept() if _is_at(copy, files[0]))
        least = sum(path.stat().st_size for path in set(_paths(files[0])))
        freed = self._source.remove(self._resolve(references[0]))
        demand(least <= copy.bytes <= freed, f"kept() says that {copy.path} takes {copy.bytes} bytes; its files have "
               f"{least}, and remove() freed {freed}", "add up the model's files, and nothing that remove() leaves")
        self._demand_kept(files[1:], "after one of two models was removed")

    def test_what_is_kept_is_not_fetched_again(self, references: Sequence[str]) -> None:
        """A second start needs no network."""
        self._needs_keeping()
        self._fetch(references[0])
        before = self.bytes_fetched()
        self._fetch(references[0])
        again = self.bytes_fetched() - before
        demand(again == 0, f"the second fetch of {references[0]!r} fetched {again} bytes",
               "look for a complete copy before anything is fetched")

    def test_an_interrupted_fetch_goes_on(self, references: Sequence[str]) -> None:
        """Models are large and networks break: what has come stays, and what comes in the end is the model."""
        self._needs_keeping()
        before = self.bytes_fetched()
        contents = _contents(self._fetch(references[0]))
        whole = self.bytes_fetched() - before
        self._source.remove(self._resolve(references[0]))
        before = self.bytes_fetched()
        cut_off = self._cut_off(references[0])
        part = self.bytes_fetched() - before
        demand(cut_off and whole * self.refetched < part < whole, f"interruption() let {part} of {whole} bytes "
               f"through, and the fetch {'failed' if cut_off else 'did not fail'}",
               f"cut the fetch off between {self.refetched:.0%} and the end of the model")
        demand(_contents(self._fetch(references[0])) == contents, "after an interruption the files have other contents",
               "check the digest or the length of what was kept before it is continued")
        both = self.bytes_fetched() - before
        demand(both <= whole * (1 + self.refetched), f"with an interruption {both} bytes were fetched for a model of "
               f"{whole}", "continue a partial file with a range request, and keep the files that are complete")

    def test_removing_deletes_what_was_kept_and_nothing_else(self, references: Sequence[str], tmp_path: Path) -> None:
        """Disk space is given back to the byte, and other models and other people's files stay."""
        self._needs_keeping()
        demand(len(references) > 1, "there is only one reference", "let `references` give two different models")
        self._fetch(references[1])
        (tmp_path / "not of the source").write_text("stays")
        before = _sizes(tmp_path)
        files = self._fetch(references[0])
        with_model = _sizes(tmp_path)
        freed = self._source.remove(self._resolve(references[0]))
        after = _sizes(tmp_path)
        left = [path for path in files.weights if path.exists()]
        demand_none([f"{path} is still there after remove()" for path in left], "delete what fetch() kept")
        demand_none([f"remove() also deleted {path}" for path in before.keys() - after.keys()],
                    "delete only the files of the reference, and keep what it shares with others")
        truth = sum(with_model.values()) - sum(after.values())
        demand(freed == truth, f"remove() says that {freed} bytes became free; {truth} did",
               "add up the sizes of the files that are deleted, each once")

    def test_removing_twice_frees_nothing_more(self, references: Sequence[str]) -> None:
        """Also removing what was never fetched; and what was removed can be fetched again."""
        self._needs_keeping()
        reference = self._resolve(references[0])
        for what in ("before anything was fetched", "a second time"):
            freed = self._source.remove(reference)
            demand(freed == 0, f"remove() {what} says that {freed!r} bytes became free",
                   "return 0 where nothing is kept")
            self._fetch(references[0])
            self._source.remove(reference)

    # ---- what the tests are made of -------------------------------------------------------------------------------

    @property
    def info(self) -> ModelSourceInfo:
        return described(self.plugin, ModelSourceInfo, self.name)

    @property
    def _source(self) -> Any:
        return self.info.make()

    def _resolve(self, reference: str) -> ModelRef:
        found = resolve(reference, registry_with(self.plugin))
        demand(found.scheme in self.info.schemes or not self.info.schemes, f"{reference!r} is of the scheme "
               f"{found.scheme!r}, which {self.name!r} does not declare",
               "let `references` give references of this source")
        return found

    def _fetch(self, reference: str) -> ModelFiles:
        """The files, by this source or, where it only opens what others find, by the source of the scheme."""
        found = self._resolve(reference)
        finders = [info for info in registry_with(self.plugin).infos(ModelSourceInfo) if found.scheme in info.schemes]
        source: ModelSource = self._source if self.info.schemes else finders[0].make()
        return source.fetch(found)

    def _open(self, reference: str) -> Checkpoint:
        """The checkpoint, by this source or, where another one reads the format, by that."""
        files = self._fetch(reference)
        readers = [info for info in registry_with(self.plugin).infos(ModelSourceInfo) if files.format in info.formats]
        chosen = next((info for info in readers if info.name == self.name), next(iter(readers), None))
        demand(chosen, f"nothing opens the format {files.format!r}", "declare it in `formats`, and implement "
               "open(); or give the files one of the formats that core reads, which are safetensors and pytorch")
        assert chosen is not None
        source: ModelSource = chosen.make()
        return source.open(files)

    def _cut_off(self, reference: str) -> bool:
        """Fetches under an interruption; whether that failed."""
        with self.interruption():
            try:
                self._fetch(reference)
            except (Exception, KeyboardInterrupt):
                return True
        return False

    def _demand_nothing_whole(self, reference: ModelRef, when: str) -> None:
        located, kept = self._source.locate(reference), list(self._source.kept())
        demand(located is None, f"{when}, locate() returns {located}", "return None unless every file is there, whole")
        demand(not kept, f"{when}, kept() lists {kept}", "list only what locate() would find")

    def _demand_kept(self, models: Sequence[ModelFiles], when: str) -> None:
        """kept() lists the models and no others, each by a reference that means its files, at a path of theirs."""
        kept = list(self._source.kept())
        located = [self._source.locate(self._resolve(copy.reference)) for copy in kept]
        found = sorted(str(files.weights) for files in located if files is not None)
        demand(found == sorted(str(files.weights) for files in models) and len(found) == len(kept),
               f"{when}, kept() lists {kept}", "list every model that is wholly kept once, by a reference with which "
               "locate() finds it")
        demand_none([f"{copy.path}, which kept() gives for {copy.reference!r}, holds none of its files"
                     for copy, files in zip(kept, located, strict=True) if files is not None
                     and not _is_at(copy, files)], "let `path` be the model's folder, or its one file")

    def _needs_keeping(self) -> None:
        if not self.info.keeps:
            pytest.skip("the source keeps no copies")


def _paths(files: ModelFiles) -> list[Path]:
    found = [*files.weights, *files.tokenizer, files.config, files.tokenizer_config, files.generation_config,
             files.chat_template, *files.more_chat_templates]
    return [path for path in found if path is not None]


def _is_at(copy: KeptModel, files: ModelFiles) -> bool:
    return all(path.is_relative_to(copy.path) for path in files.weights)


def _contents(files: ModelFiles) -> dict[str, bytes]:
    return {str(path.relative_to(files.root)): path.read_bytes() for path in (*files.weights, *files.tokenizer)}


def _sizes(folder: Path) -> dict[str, int]:
    """Path -> bytes on this machine; links are no files of their own."""
    found: list[Path] = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): path.stat().st_size for path in found}
