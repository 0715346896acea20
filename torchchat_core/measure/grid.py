"""Every way to run a model that is installed, beside the reference: the pairs of `torchchat verify MODEL --all`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.text import measured_text
from torchchat_core.measure.verdict import as_json
from torchchat_core.measure.verifying import another, verify
from torchchat_core.own_process import in_own_process, request_arguments, request_of
from torchchat_core.pipeline import ModelRequest, choose_device, choose_dtype, export_model, has_device
from torchchat_core.plugins import Registry
from torchchat_core.specs import DEVICES, DTYPES, ExecutorInfo, ExporterInfo
from torchchat_core.support import IN_MEMORY, Combination, all_combinations, refusal

VERIFY, EXPORT = f"{__name__}:verify_pair", f"{__name__}:export_second"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A way to run the model, and what it is held against."""

    way: Combination
    against: Combination
    first: ModelRequest
    second: ModelRequest
    executor: str  # of the way, by the name that users give it
    exporter: ExporterInfo | None = None  # that writes the second one before it is run, from the first one

    @property
    def runtime(self) -> str:
        """What tells it from others that compute in the same dtype with the same layers: "aoti .pt2"."""
        return f"{self.executor} {self.exporter.suffix}" if self.exporter is not None else self.executor

    def __str__(self) -> str:
        return f"{self.way}, by {self.exporter.name}" if self.exporter is not None else str(self.way)


def pairs(request: ModelRequest, registry: Registry) -> list[Pair]:
    """Each working combination and its reference: the first executor of models in memory on the same device, in the
    same dtype, with the same scheme. The reference itself is held against what it does in float32 on the first device.
    Those that need no export come first, and those of one export follow each other.

    Device and dtype of the request, where it names them, are the only ones. What quantising costs is not looked at:
    `torchchat quantize --report` tells.
    """
    reference = _reference(request, registry)
    settled = {qualified: info.name for qualified, info in registry.settled(ExecutorInfo)}
    devices = [device for device in DEVICES if has_device(device)] if request.device in ("fast", "auto") \
        else [choose_device(request.device)]
    dtypes = DTYPES if request.dtype is None else (choose_dtype(request.dtype, devices[0], torch.float32),)
    base = Combination(executor=reference, device=devices[0], dtype=dtypes[0])
    working = [each for each in all_combinations(registry) if each.executor in settled and each.device in devices
               and each.dtype in dtypes and refusal(each, registry) is None]
    return sorted((pair for each in working for pair in _pair(each, reference, request, base, registry)), key=_order)


def _reference(request: ModelRequest, registry: Registry) -> str:
    """The qualified name of the executor that others are held against."""
    if request.executor != "auto":
        wanted = registry.find(ExecutorInfo, request.executor)
        return next(qualified for qualified, info in registry.offers(ExecutorInfo) if info is wanted)
    fitting = sorted((info.order, qualified) for qualified, info in registry.settled(ExecutorInfo)
                     if IN_MEMORY in info.reads)
    if not fitting:
        raise TorchchatError("no installed executor runs models in memory", registry.how_to_get("reads", IN_MEMORY))
    return fitting[0][1]


def _order(pair: Pair) -> tuple[Any, ...]:
    way, exporter = pair.way, pair.exporter.name if pair.exporter is not None else ""
    return (way.format != IN_MEMORY, way.scheme or "", DEVICES.index(way.device), DTYPES.index(way.dtype), way.format,
            exporter, way.executor)


def _pair(each: Combination, reference: str, request: ModelRequest, base: Combination, registry: Registry
          ) -> Iterator[Pair]:
    beside = dataclasses.replace(each, executor=reference, format=IN_MEMORY)
    against = base if each == beside else beside
    exporters: list[ExporterInfo | None] = [None]
    if each.format != IN_MEMORY:
        exporters = [info for info in registry.infos(ExporterInfo) if info.writes == each.format
                     and each.dtype in info.dtypes and each.device in info.devices
                     and (each.scheme is None or each.scheme in info.schemes)]
    elif each == beside and (each.scheme is not None or each == base):
        return
    name = registry.find(ExecutorInfo, each.executor).name
    for exporter in exporters:
        yield Pair(way=each, against=against, first=_request(request, against), second=_request(request, each),
                   executor=each.executor if registry.contested(ExecutorInfo, name) else name, exporter=exporter)


def _request(request: ModelRequest, wanted: Combination) -> ModelRequest:
    return dataclasses.replace(request, executor=wanted.executor, device=wanted.device, dtype=wanted.dtype,
                               quantize=wanted.scheme)


class Grid:
    """Runs pairs in processes of their own. A file that several of them run is exported once, and goes when the next
    one is needed: all of them together may be many times as large as the model."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        """`folder`: an empty one, for the exported files."""
        self._folder, self._registry = folder, registry
        self._exported: tuple[Any, Path | TorchchatError] | None = None  # the last one: what it is of, and where

    def verified(self, pair: Pair, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The verification as JSON; `settings` are arguments of `verify_pair`.

        Raises `TorchchatError` where one of the two does not run, or cannot be exported.
        """
        second = pair.second
        if pair.exporter is not None:
            second = dataclasses.replace(another(second, str(self._file(pair, pair.exporter))),
                                         executor=second.executor)
        return in_own_process(VERIFY, {"first": request_arguments(pair.first), "second": request_arguments(second),
                                       **settings}, self._registry)

    def _file(self, pair: Pair, exporter: ExporterInfo) -> Path:
        wanted = dataclasses.replace(pair.second, executor="auto")
        if self._exported is None or self._exported[0] != (wanted, exporter):
            for path in self._folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._exported = (wanted, exporter), self._export(wanted, exporter)
        found = self._exported[1]
        if isinstance(found, TorchchatError):
            raise found
        return found

    def _export(self, wanted: ModelRequest, exporter: ExporterInfo) -> Path | TorchchatError:
        path = self._folder / f"model{exporter.suffix}"
        try:
            in_own_process(EXPORT, {"request": request_arguments(wanted), "exporter": exporter.name,
                                    "path": str(path)}, self._registry)
        except TorchchatError as error:  # which all that would run the file are told
            return TorchchatError(f"it cannot be exported: {error.message}", error.fix)
        return path


# ---- within the new processes -------------------------------------------------------------------------------------


def export_second(registry: Registry, request: Mapping[str, Any], exporter: str, path: str) -> dict[str, Any]:
    """A task: writes the exported file."""
    info = registry.find(ExporterInfo, exporter)
    export_model(request_of(request), info, Path(path), info.options() if info.options else None, registry)
    return {}


def verify_pair(registry: Registry, first: Mapping[str, Any], second: Mapping[str, Any], file: str | None,
                characters: int, **settings: Any) -> dict[str, Any]:
    """A task: the verification as JSON. The text is `file`, or torchchat's own."""
    text = measured_text(Path(file) if file is not None else None, characters)
    return as_json(verify(request_of(first), request_of(second), registry, text, **settings))
