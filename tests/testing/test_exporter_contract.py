"""The exporter contract finds each kind of fault. This file is also the plugin that offers the faulty exporters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from tc_eager.executor import EagerExecutor, EagerModel
from torchchat_core.hookspecs import hookimpl
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.sources.checkpoints import StoredCheckpoint, StoredTensor
from torchchat_core.specs import ExecutorInfo, ExporterInfo, ExportRequest, LoadRequest, ModelFiles, ModelSourceInfo
from torchchat_core.testing import ExporterContract
from torchchat_core.testing.session_contract import SessionContract


class Reader:
    """Runs exported files."""

    def load(self, request: LoadRequest) -> EagerModel:
        saved = torch.load(request.artifact)
        module = Transformer(ModelConfig(**saved["config"])).eval().requires_grad_(False)
        module.load_state_dict(torch.load(saved["path"]) if "path" in saved else saved["state"])
        module = module.to(request.device, TORCH_DTYPES[request.dtype])
        return EagerExecutor().load(LoadRequest(device=request.device, dtype=request.dtype, module=module))


class Right:
    """An exporter without a fault."""

    writes = "kept"

    def export(self, request: ExportRequest) -> None:
        self.put(request.module, request.path)

    def put(self, module: Transformer, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        try:
            self.write(module, part)
            os.replace(part, path)  # noqa: PTH105 - the function that the contract makes fail
        finally:
            part.unlink(missing_ok=True)

    def write(self, module: Transformer, path: Path) -> None:
        torch.save({"config": asdict(module.config), "state": module.state_dict()}, path)


class LosesPrecision(Right):
    def write(self, module: Transformer, path: Path) -> None:
        state = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
        torch.save({"config": asdict(module.config), "state": state}, path)


class AddsASuffix(Right):
    def put(self, module: Transformer, path: Path) -> None:
        super().put(module, path.with_suffix(".bin"))


class LeavesALog(Right):
    def put(self, module: Transformer, path: Path) -> None:
        super().put(module, path)
        path.with_name("export.log").write_text("done")


class PointsToAnotherFile(Right):
    def write(self, module: Transformer, path: Path) -> None:
        weights = path.with_name("weights.bin")
        torch.save(module.state_dict(), weights)
        torch.save({"config": asdict(module.config), "path": str(weights)}, path)


class SpoilsTheModel(Right):
    def write(self, module: Transformer, path: Path) -> None:
        super().write(module, path)
        module.lm_head.weight.mul_(2)


class WritesWhatCannotBeRead(Right):
    def write(self, module: Transformer, path: Path) -> None:
        path.write_bytes(b"not a model")


class WritesInPlace(Right):
    def put(self, module: Transformer, path: Path) -> None:
        state = module.state_dict()
        with path.open("wb") as file:
            torch.save({"config": asdict(module.config), "state": state}, file)


class KeepsTheOldFile(Right):
    def put(self, module: Transformer, path: Path) -> None:
        if not path.exists():
            super().put(module, path)


class LeavesAPart(Right):
    def put(self, module: Transformer, path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"kept")
            torch.save({"config": asdict(module.config), "state": module.state_dict()}, file)


class DeletesFirst(Right):
    def put(self, module: Transformer, path: Path) -> None:
        path.unlink(missing_ok=True)
        super().put(module, path)


class HidesErrors(Right):
    def write(self, module: Transformer, path: Path) -> None:
        with contextlib.suppress(RuntimeError):
            super().write(module, path)
        path.touch()


class LeavesTheWholePart(Right):
    def put(self, module: Transformer, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        self.write(module, part)
        part.replace(path)


class WritesForNobody(Right):
    writes = "unread"


class Source:
    """Opens exported files, for executors of modules."""

    def open(self, files: ModelFiles) -> StoredCheckpoint:
        saved = torch.load(files.weights[0])
        return StoredCheckpoint(ModelConfig(**saved["config"]), {
            name: StoredTensor(tuple(tensor.shape), partial(tensor.clone)) for name, tensor in saved["state"].items()})


class ForASource(Right):
    writes = "opened"


class LosesPrecisionForASource(LosesPrecision):
    writes = "opened"


TABLE = [
    (LosesPrecision, "test_logits_are_those_of_the_reference", "logits are off by"),
    (AddsASuffix, "test_the_file_is_where_it_was_asked_for", "leaves ['my model.v1.bin'] in the folder"),
    (LeavesALog, "test_the_file_is_where_it_was_asked_for", "leaves ['export.log', 'my model.v1.kept']"),
    (PointsToAnotherFile, "test_the_file_stands_alone", "cannot be loaded by 'reader': FileNotFoundError"),
    (SpoilsTheModel, "test_the_file_stands_alone", "second.kept, moved to another folder, gives other logits"),
    (WritesWhatCannotBeRead, "test_the_file_stands_alone", "cannot be loaded by 'reader': UnpicklingError"),
    (WritesInPlace, "test_an_existing_file_is_replaced_as_a_whole", "the existing file was written to"),
    (KeepsTheOldFile, "test_an_existing_file_is_replaced_as_a_whole", "the existing file was not replaced"),
    (LeavesAPart, "test_a_failed_export_leaves_nothing", "the folder that held [] holds ['model.kept']"),
    (DeletesFirst, "test_a_failed_export_leaves_nothing", "the folder that held ['model.kept'] holds []"),
    (HidesErrors, "test_a_failed_export_leaves_nothing", "a model that cannot be read was exported"),
    (LeavesTheWholePart, "test_a_failure_at_the_very_end_leaves_nothing", "holds ['model.kept', 'model.kept.part']"),
]


@hookimpl
def torchchat_exporters() -> list[ExporterInfo]:
    return [ExporterInfo(name=exporter.__name__.lower(), summary="faulty", factory=f"{__name__}:{exporter.__name__}",
                         writes=exporter.writes, suffix=".kept", devices=frozenset({"cpu"}), dtypes=frozenset({"fp32"}))
            for exporter in {Right, WritesForNobody, ForASource, LosesPrecisionForASource, *(row[0] for row in TABLE)}]


@hookimpl
def torchchat_executors() -> list[ExecutorInfo]:
    return [ExecutorInfo(name="reader", summary="runs files", factory=f"{__name__}:Reader", reads=frozenset({"kept"}),
                         devices=frozenset({"cpu", "cuda"}), dtypes=frozenset({"fp32", "bf16"}),
                         abilities=frozenset({"score", "batch", "prompt_batch", "fork", "embed"}))]


@hookimpl
def torchchat_model_sources() -> list[ModelSourceInfo]:
    return [ModelSourceInfo(name="source", summary="opens files", factory=f"{__name__}:Source",
                            formats=frozenset({"opened"}))]


class KeptContract(ExporterContract):
    plugin, name = __name__, "right"
    variants = ("llama", "biases")


class TestRight(KeptContract):
    pass


class TestOpenedByASource(KeptContract):
    """What no executor reads, and a model source opens, is run as a module."""

    name, variants = "forasource", ("llama",)
    executor_plugin = "tc_eager"


def contract(exporter: type[Right], base: type[ExporterContract] = KeptContract) -> type[ExporterContract]:
    """The contract of one of the exporters, as a test class of this module."""
    name = f"Contract{exporter.__name__}"
    globals()[name] = type(name, (base,), {"name": exporter.__name__.lower(), "__module__": __name__})
    return globals()[name]


FAULTS = [(contract(exporter), test, words) for exporter, test, words in TABLE]
FAULTS += [(contract(LosesPrecisionForASource, TestOpenedByASource), "test_logits_are_those_of_the_reference",
            "logits are off by")]


@pytest.mark.parametrize(("contract", "test", "words"), FAULTS)
def test_the_fault_is_found(contract: type, test: str, words: str, failures: Mapping[tuple[str, str], str]) -> None:
    assert words in failures[contract.__name__, test]


def test_every_demand_has_a_fault() -> None:
    own = {name for name in dir(ExporterContract) if name.startswith("test_") and not hasattr(SessionContract, name)}
    assert own <= {test for _, test, _ in FAULTS}


def test_an_executor_of_modules_is_asked_for_where_a_source_opens_the_file() -> None:
    class WithoutExecutor(KeptContract):
        name = "forasource"

    with pytest.raises(AssertionError, match="has no executor that reads 'module' models"):
        WithoutExecutor().executor_info()


def test_files_that_no_executor_reads_are_told() -> None:
    with pytest.raises(AssertionError, match="has no executor that reads 'unread' files"):
        contract(WritesForNobody)().executor_info()
