"""Which executors and recipes one model can be run with here: what a frontend offers to choose from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

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
from torchchat_core.specs import Checkpoint, QuantizerInfo, is_layered
from torchchat_core.support import IN_MEMORY, choose_executor, readers


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What a model can be run with. `None` among the recipes: as it is."""

    executors: tuple[str, ...]  # names for --executor; qualified ones where a bare name would be ambiguous
    recipes: tuple[str | None, ...]  # for --quantize, with at least one of the executors


def fitting(request: ModelRequest, registry: Registry) -> Fitting:
    """The executors that run the model of the request with its recipe, and the recipes that its executor runs.

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
    executors = readers(IN_MEMORY, registry)
    return Fitting(
        executors=tuple(name for name in executors
                        if _runs(dataclasses.replace(request, executor=name), checkpoint, registry)),
        recipes=tuple(recipe for recipe in recipes
                      if _runs(dataclasses.replace(request, quantize=recipe), checkpoint, registry)))


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
