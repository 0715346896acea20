"""Every way to run a model that is installed, beside the reference: the pairs of `torchchat verify MODEL --all`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.processes import request_of
from torchchat_core.measure.text import measured_text
from torchchat_core.measure.verdict import as_json
from torchchat_core.measure.verifying import another, verify
from torchchat_core.pipeline import ModelRequest, choose_device, choose_dtype, export_model, has_device
from torchchat_core.plugins import Registry
from torchchat_core.specs import DEVICES, DTYPES, ExecutorInfo, ExporterInfo
from torchchat_core.support import IN_MEMORY, Combination, all_combinations, refusal

TASK = f"{__name__}:verify_pair"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A way to run the model, and what it is held against."""

    name: str
    against: str
    first: ModelRequest
    second: ModelRequest
    exporter: str | None = None  # that writes the second one before it is run, from the first one


def pairs(request: ModelRequest, registry: Registry) -> Iterator[Pair]:
    """Each working combination and its reference: the first executor of models in memory on the same device, in the
    same dtype, with the same scheme. The reference itself is held against what it does in float32 on the first device.

    Device and dtype of the request, where it names them, are the only ones. What quantising costs is not looked at:
    `torchchat quantize --report` tells.
    """
    reference = _reference(request, registry)
    settled = {qualified: info.name for qualified, info in registry.settled(ExecutorInfo)}
    devices = [device for device in DEVICES if has_device(device)] if request.device in ("fast", "auto") \
        else [choose_device(request.device)]
    dtypes = DTYPES if request.dtype is None else (choose_dtype(request.dtype, devices[0], torch.float32),)
    for each in all_combinations(registry):
        if each.executor in settled and each.device in devices and each.dtype in dtypes \
                and refusal(each, registry) is None:
            yield from _pair(each, reference, request, Combination(executor=reference, device=devices[0],
                                                                   dtype=dtypes[0]), registry)


def _reference(request: ModelRequest, registry: Registry) -> str:
    """The qualified name of the executor that others are held against."""
    if request.executor != "auto":
        wanted = registry.find(ExecutorInfo, request.executor)
        return next(qualified for qualified, info in registry.offers(ExecutorInfo) if info is wanted)
    fitting = sorted((info.order, qualified) for qualified, info in registry.settled(ExecutorInfo)
                     if IN_MEMORY in info.reads)
    if not fitting:
        raise TorchchatError("no installed executor runs models in memory", "pip install tc-eager")
    return fitting[0][1]


def _pair(each: Combination, reference: str, request: ModelRequest, base: Combination, registry: Registry
          ) -> Iterator[Pair]:
    second = _request(request, each)
    if each.format != IN_MEMORY:
        beside = dataclasses.replace(each, executor=reference, format=IN_MEMORY)
        for exporter in registry.infos(ExporterInfo):
            if exporter.writes == each.format and each.dtype in exporter.dtypes and each.device in exporter.devices \
                    and (each.scheme is None or each.scheme in exporter.schemes):
                yield Pair(name=f"{each}, by {exporter.name}", against=str(beside), first=_request(request, beside),
                           second=second, exporter=exporter.name)
    elif each.executor != reference:
        beside = dataclasses.replace(each, executor=reference)
        yield Pair(name=str(each), against=str(beside), first=_request(request, beside), second=second)
    elif each.scheme is None and each != base:
        yield Pair(name=str(each), against=str(base), first=_request(request, base), second=second)


def _request(request: ModelRequest, wanted: Combination) -> ModelRequest:
    return dataclasses.replace(request, executor=wanted.executor, device=wanted.device, dtype=wanted.dtype,
                               quantize=wanted.scheme)


def verify_pair(registry: Registry, first: Mapping[str, Any], second: Mapping[str, Any], exporter: str | None,
                file: str | None, characters: int, **settings: Any) -> dict[str, Any]:
    """A task for a process of its own: the verification as JSON. The text is `file`, or torchchat's own."""
    text = measured_text(Path(file) if file is not None else None, characters)
    one, other = request_of(first), request_of(second)
    if exporter is None:
        return as_json(verify(one, other, registry, text, **settings))
    info = registry.find(ExporterInfo, exporter)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{info.suffix}"
        export_model(dataclasses.replace(other, executor="auto"), info, path, info.options() if info.options else None,
                     registry)
        opened = dataclasses.replace(another(other, str(path)), executor=other.executor)
        return as_json(verify(one, opened, registry, text, **settings))
