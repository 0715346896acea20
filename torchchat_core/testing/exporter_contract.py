"""The contract of an exporter, and of the executor that reads what it writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES, build_model
from torchchat_core.specs import (
    ExecutorInfo,
    ExporterInfo,
    ExportRequest,
    LoadRequest,
    ModelFiles,
    ModelRef,
    ModelSourceInfo,
)
from torchchat_core.testing.cases import Case
from torchchat_core.testing.demands import demand, described, load_plugin, options_of
from torchchat_core.testing.models import PROMPTS, reference_logits, seeded, variant_config
from torchchat_core.testing.session_contract import SessionContract

OLD = b"an older file"


class ExporterContract(SessionContract):
    """What an exporter writes is whole or absent, stands alone, and runs as the model in memory does.

        class TestExporter(ExporterContract):
            plugin, name = "my_plugin", "mine"
            variants = ("llama", "tied")  # fewer than models.VARIANTS, where others are not supported

    Every test of `SessionContract` runs on files: each variant is exported once for each dtype and device. An
    exporter is not itself bound to raise `TorchchatError` for a model that it cannot write.

    Where no executor reads the files, but a model source of the exporter's plugin opens them, the model that it finds
    in a file is built, and run by an executor of modules: with `executor_plugin = "tc_eager"` by the reference.
    """

    plugin: str  # the module that the entry point names
    name: str  # of the exporter
    options: Mapping[str, Any] = {}  # values of its options, where they are not the defaults
    executor_plugin: str | None = None  # the plugin of the executor that reads the files; None: the exporter's own

    def exporter_info(self) -> ExporterInfo:
        """The description of the exporter."""
        return described(self.plugin, ExporterInfo, self.name)

    def executor_info(self) -> ExecutorInfo:
        written, plugin = self.exporter_info().writes, self.executor_plugin or self.plugin
        offers = load_plugin(plugin).offers
        wanted, called = (written, "files") if self.source_info() is None else ("module", "models")
        readers = [info for info in offers if isinstance(info, ExecutorInfo) and wanted in info.reads]
        demand(readers, f"the plugin {plugin!r} has no executor that reads {wanted!r} {called}", "let `writes` of the "
               "exporter be among `reads` of an executor; set `executor_plugin` where another plugin offers that")
        return readers[0]

    def source_info(self) -> ModelSourceInfo | None:
        """The model source of the exporter's plugin that opens the files; None where executors read them."""
        offers, written = load_plugin(self.plugin).offers, self.exporter_info().writes
        opening = [info for info in offers if isinstance(info, ModelSourceInfo) and written in info.formats]
        return opening[0] if opening else None

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        exporter, executor = self.exporter_info(), self.executor_info()
        return exporter.devices & executor.devices, exporter.dtypes & executor.dtypes

    def request(self, module: Transformer, device: str, dtype: str, folder: Path) -> LoadRequest:
        path = folder / f"model{self.exporter_info().suffix}"
        if not path.exists():
            self.export(module, path)
        return self._request_for(path, device, dtype)

    def export(self, module: Transformer, path: Path) -> None:
        """Has the exporter write the module, whose dtype and device are those of its weights."""
        weight = next(module.parameters())
        dtype = next(name for name, known in TORCH_DTYPES.items() if known == weight.dtype)
        options = options_of(self.exporter_info(), self.options)
        self.exporter_info().make().export(ExportRequest(module=module, path=path, device=weight.device.type,
                                                         dtype=dtype, options=options))

    def broken(self, module: Transformer) -> Transformer:
        """The module, changed so that exporting it fails as late as can be: its last norm can neither run nor be read.

        Override it where the exporter would not notice.
        """
        module.model.norm = Broken()  # type: ignore[assignment]
        return module

    # ---- the file -------------------------------------------------------------------------------------------------

    def test_the_file_is_where_it_was_asked_for(self, case: Case, tmp_path: Path) -> None:
        """One file, under the very name that the user gave, and nothing beside it."""
        path = tmp_path / f"my model.v1{self.exporter_info().suffix}"
        self.export(self._module(case), path)
        found = sorted(each.name for each in tmp_path.iterdir())
        demand(found == [path.name], f"exporting to {path.name!r} leaves {found} in the folder",
               "write to the path as it is, put all that the file needs into it, and remove what was only in between")

    def test_the_file_stands_alone(self, case: Case, tmp_path: Path) -> None:
        """It is copied to another machine: it loads wherever it lies, also when it was exported a second time."""
        module, suffix = self._module(case), self.exporter_info().suffix
        (tmp_path / "made").mkdir()
        made = [tmp_path / "made" / f"{name}{suffix}" for name in ("first", "second")]
        for path in made:
            self.export(module, path)
        moved = [path.rename(tmp_path / path.name) for path in made]
        shutil.rmtree(tmp_path / "made")
        expected = self._expected(case)
        for path in moved:
            given = self._answer(path, case)
            demand(given is not None and torch.allclose(given, expected, atol=self._slack(expected, case), rtol=0),
                   f"{path.name}, moved to another folder, gives other logits than the model",
                   "keep paths out of the file, and leave the module as it was")

    def test_an_existing_file_is_replaced_as_a_whole(self, case: Case, tmp_path: Path) -> None:
        """Someone may be reading the old one: it must not change under them, and the new one must not be half there."""
        path, same_file = tmp_path / f"model{self.exporter_info().suffix}", tmp_path / "old"
        path.write_bytes(OLD)
        try:
            os.link(path, same_file)
        except OSError:
            pytest.skip("this file system has no hard links, by which the test would see the old file")
        self.export(self._module(case), path)
        demand(path.read_bytes() != OLD, "the existing file was not replaced", "replace what is at the path")
        demand(same_file.read_bytes() == OLD, "the existing file was written to",
               "write to a temporary file in the same folder, and then os.replace() it")

    def test_a_failed_export_leaves_nothing(self, case: Case, tmp_path: Path) -> None:
        """Neither a part of a file, nor less than there was before."""
        path = tmp_path / f"model{self.exporter_info().suffix}"
        for before in ({}, {path.name: OLD}):
            for name, content in before.items():
                (tmp_path / name).write_bytes(content)
            failed = self._fails(self.broken(self._module(case)), path)
            demand(failed, "a model that cannot be read was exported", "let errors out; override `broken` in the "
                   "contract where this exporter has no need of the model's last norm")
            self._demand_only(before, tmp_path, "an export that failed")

    def test_a_failure_at_the_very_end_leaves_nothing(self, case: Case, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
        """When the finished file cannot be put in its place, the old one stays and the new one goes."""
        path = tmp_path / f"model{self.exporter_info().suffix}"
        path.write_bytes(OLD)

        def full(*_: Any, **__: Any) -> NoReturn:
            raise OSError("no space left on device, says the contract")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            patch.setattr(os, "rename", full)
            failed = self._fails(self._module(case), path)
        if failed:
            self._demand_only({path.name: OLD}, tmp_path, "an export whose file could not be put in its place")

    # ---- what the tests are made of -------------------------------------------------------------------------------

    def _module(self, case: Case) -> Transformer:
        return seeded(variant_config(case.variant)).to(case.device, TORCH_DTYPES[case.dtype])

    def _request_for(self, path: Path, device: str, dtype: str) -> LoadRequest:
        source, options = self.source_info(), options_of(self.executor_info(), {})
        if source is None:
            return LoadRequest(device=device, dtype=dtype, artifact=path, options=options)
        files = ModelFiles(ref=ModelRef(text=str(path), scheme="file", location=str(path)), root=path.parent,
                           format=self.exporter_info().writes, weights=(path,))
        module = build_model(source.make().open(files), TORCH_DTYPES[dtype], device)
        return LoadRequest(device=device, dtype=dtype, module=module, options=options)

    def _expected(self, case: Case) -> Tensor:
        return reference_logits(self._module(case).cpu().float(), PROMPTS[1])[-1]

    def _slack(self, expected: Tensor, case: Case) -> float:
        return self.tolerances[case.dtype] * float(expected.abs().max())

    def _answer(self, path: Path, case: Case) -> Tensor | None:
        """Logits of the exported model behind a prompt; None, and the failure told, where it cannot be loaded."""
        try:
            model = self.executor_info().make().load(self._request_for(path, case.device, case.dtype))
        except Exception as error:
            demand(False, f"{path.name} cannot be loaded by {self.executor_info().name!r}: {type(error).__name__}: "
                   f"{error}", "write all that the executor needs into the file")
            return None
        logits: Tensor = model.session().prefill(PROMPTS[1])
        model.close()
        return logits

    def _fails(self, module: Transformer, path: Path) -> bool:
        try:
            self.export(module, path)
        except Exception:
            return True
        return False

    def _demand_only(self, wanted: Mapping[str, bytes], folder: Path, after: str) -> None:
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        demand(found == wanted, f"after {after}, the folder that held {sorted(wanted)} holds {sorted(found)}, "
               f"{'and the old file is another' if found.keys() == wanted.keys() else 'which are others'}",
               "write to a temporary file in the same folder, os.replace() it when it is whole, and delete it where "
               "anything fails")


class Broken(nn.Module):
    """Raises when it is run, and when its parameters are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_parameters"] = Unreadable()

    def forward(self, hidden: Tensor) -> NoReturn:  # noqa: ARG002
        raise RuntimeError("this layer is broken, says the contract")


class Unreadable(dict[str, nn.Parameter]):
    """A dictionary that cannot be gone through."""

    def items(self) -> NoReturn:
        raise RuntimeError("these parameters cannot be read, says the contract")
