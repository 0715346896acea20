"""Which devices, dtypes, executors and recipes one model can be run with here: what a frontend offers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torchchat_core.artifacts import exported_file, open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import (
    ModelRequest,
    choose_dtype,
    chosen_device,
    fetch_files,
    open_checkpoint,
    wished_dtype,
)
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import parse_recipe, recipe_names
from torchchat_core.specs import DEVICES, DTYPES, Checkpoint, QuantizerInfo, is_layered
from torchchat_core.support import IN_MEMORY, choose_executor, readers


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What a model can be run with: for each, what can be changed of the request while the rest of it stays."""

    executors: tuple[str, ...]  # names for --executor; qualified ones where a bare name would be ambiguous
    recipes: tuple[str | None, ...]  # for --quantize; None: as it is
    devices: tuple[str, ...] = ()  # for --device, of this machine; none where a file was made for one
    dtypes: tuple[str, ...] = ()  # for --dtype, likewise


def fitting(request: ModelRequest, registry: Registry) -> Fitting:
    """What runs the model of the request: executors with its recipe, recipes that its executor runs, and so on.

    The model's files are fetched where they are not here; no tensor is read. Raises `TorchchatError` for a model that
    cannot be opened.
    """
    files = fetch_files(request, registry)
    path = exported_file(files)
    if path is not None:
        return Fitting(executors=readers(open_artifact(path).manifest.kind, registry), recipes=(None,))
    checkpoint = open_checkpoint(request, files, registry)
    recipes = [None] if is_layered(checkpoint) else \
        [None, *recipe_names(), *sorted({info.scheme for info in registry.infos(QuantizerInfo)})]

    def runs(**changes: Any) -> bool:
        return _runs(dataclasses.replace(request, **changes), checkpoint, registry)

    return Fitting(executors=tuple(name for name in readers(IN_MEMORY, registry) if runs(executor=name)),
                   recipes=tuple(recipe for recipe in recipes if runs(quantize=recipe)),
                   devices=tuple(device for device in DEVICES if runs(device=device)),
                   dtypes=tuple(dtype for dtype in DTYPES if runs(dtype=dtype)))


def _runs(request: ModelRequest, checkpoint: Checkpoint, registry: Registry) -> bool:
    """Whether the declarations permit it: the recipe's sections, the device that is here, the dtype, the executor."""
    try:
        wished = parse_recipe(request.quantize, registry) if request.quantize is not None else None
        device = chosen_device(request, wished)
        dtype = choose_dtype(wished_dtype(request, wished), device, checkpoint.dtype)
        own = checkpoint.schemes if is_layered(checkpoint) else ()
        schemes = wished.settle(registry, device, dtype).schemes if wished is not None else own
        choose_executor(request.executor, device, dtype, schemes, registry, is_layered(checkpoint))
    except TorchchatError:
        return False
    return True
