"""From the name of a model to one that runs: the stages of torchchat in their order, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from torchchat_core.artifacts import exported_file
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.exporting_once import exported_once
from torchchat_core.fastest import remembered_executor
from torchchat_core.first_load import remember_export
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rotary import beyond_dynamic
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES, build_model
from torchchat_core.plugins import Registry
from torchchat_core.products import reference_of
from torchchat_core.quantization.calibration import CalibrationText, read_calibration
from torchchat_core.quantization.keeping import KeptCheckpoint, KeptReport, keep_quantised
from torchchat_core.quantization.recipe import Recipe, RecipeReport, RecipeText, parse_recipe, stored_recipe
from torchchat_core.quantization.replacing import stored_bytes, token_bytes
from torchchat_core.quantization.saved import refuse_quantised
from torchchat_core.run_options import DEVICES, DTYPE_NAMES, FAST_DEVICES, check_device, check_dtype
from torchchat_core.small_files import expanded, read_json
from torchchat_core.sources.reference import missing_file, resolve
from torchchat_core.specs import (
    Calibration,
    Checkpoint,
    ExecutorInfo,
    ExporterInfo,
    ExportRequest,
    LoadedModel,
    LoadRequest,
    ModelFiles,
    is_layered,
)
from torchchat_core.support import choose_executor, require_export
from torchchat_core.text_content import text_content
from torchchat_core.text_format import TextFormat, read_text_format

DEFAULT_MODEL = "embedded:guide"  # a folder called "embedded" is another model


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What was asked for: a model, perhaps with files of its own choice, and how to run it."""

    model: str | None = None
    checkpoint_path: str | None = None
    params_path: str | None = None
    tokenizer_path: str | None = None
    adapter: str | None = None  # folder of a LoRA adapter, merged into the weights
    hf_token: str | None = None  # for models that need their owner's permission
    executor: str = "auto"
    device: str = "fast"
    dtype: str | None = None  # None: the checkpoint's own, where the device is good at it
    quantize: str | None = None  # a scheme, a recipe, or a file that holds one
    calibration: CalibrationText | None = None  # for a recipe that is made with a text, and for no other
    keep_quantized: bool = False  # run the layers that the file holds quantised as they are
    max_seq_length: int | None = None
    defaults: frozenset[str] = frozenset()  # names of the fields that nobody asked for now: they are settings


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model ready to run, and the text side of it."""

    name: str
    model: LoadedModel
    text_format: TextFormat
    executor: ExecutorInfo
    max_seq_length: int  # tokens that a sequence may have: the model's own, or fewer where asked for
    weight_bytes: int  # of all weights as they are stored, before the executor packs them; shared ones count once
    token_bytes: int  # of them, what one token reads: all but the input embedding, unless the output shares it
    schemes: tuple[str, ...] = ()  # of its quantised layers: "linear:int4", "embedding:int8"
    recipe: str | None = None  # what they were made by, as the text of a `Recipe`
    quantisation: RecipeReport | None = None  # where a recipe was applied
    kept: KeptReport | None = None  # where the file's own quantised layers were kept


@contextmanager
def open_model(request: ModelRequest, registry: Registry) -> Iterator[OpenedModel]:
    """Fetches, opens, builds and loads the model; gives its memory back at the end. An exported file is loaded as
    it is, and a model whose executor reads only such files is exported once.

    Raises `TorchchatError` for whatever is missing, damaged, unknown or impossible on this machine.
    """
    files = fetch_files(request, registry, running=True)
    if exported_file(files) is None and (kept := exported_once(request, files, registry)) is not None:
        request, files = kept
    if exported_file(files) is not None:
        from torchchat_core.opening_artifacts import open_exported

        with open_exported(request, files, registry) as opened:
            yield opened
        return
    wished = parse_recipe(request.quantize, registry) if request.quantize is not None else None
    device = chosen_device(request, wished)
    checkpoint = open_checkpoint(request, files, registry)
    limit = checked_limit(request.max_seq_length, checkpoint.config.max_context)
    text_format = read_text_format(files, registry, checkpoint.config.vocab_size)
    dtype = choose_dtype(wished_dtype(request, wished), device, checkpoint.dtype)
    recipe = _settled(wished, request, checkpoint, registry, device, dtype)
    schemes = _schemes(recipe, checkpoint)
    made_by = str(recipe) if recipe is not None and recipe.steps else stored_recipe(
        getattr(checkpoint, "recipe", None), schemes, registry, device, dtype)
    executor = _executor(request, files, device, dtype, schemes, made_by, registry, is_layered(checkpoint))
    module = build_model(checkpoint, TORCH_DTYPES[dtype], device)
    windows = _calibration(request, files, checkpoint, registry)
    report = _applied(recipe, module, windows, checkpoint, dtype) if recipe is not None else None
    sizes = stored_bytes(module), token_bytes(module)
    model: LoadedModel = executor.make().load(LoadRequest(device=device, dtype=dtype, module=module))
    try:
        yield OpenedModel(name=files.ref.text, model=model, text_format=text_format, executor=executor,
                          max_seq_length=limit, weight_bytes=sizes[0], token_bytes=sizes[1],
                          schemes=schemes, recipe=made_by, quantisation=report,
                          kept=checkpoint.report if isinstance(checkpoint, KeptCheckpoint) else None)
    finally:
        model.close()


def _executor(request: ModelRequest, files: ModelFiles, device: str, dtype: str, schemes: tuple[str, ...],
              recipe: str | None, registry: Registry, stored: bool) -> ExecutorInfo:
    """The one that was asked for; for "auto", what `torchchat bench --save` found to be the fastest, where it fits."""
    if request.executor == "auto":
        fastest = remembered_executor(reference_of(files.ref), device, dtype, recipe)
        if fastest is not None:
            with contextlib.suppress(TorchchatError):  # it may be installed no more
                return choose_executor(fastest, device, dtype, schemes, registry, stored)
    return choose_executor(request.executor, device, dtype, schemes, registry, stored)


def export_model(request: ModelRequest, exporter: ExporterInfo, path: Path, options: Any,
                 registry: Registry, longest: int | None = None) -> ModelFiles:
    """Fetches, opens and builds the model, and has `exporter` write it to `path`; the files that it was made of.

    The dtype is the checkpoint's own unless another one is asked for. `longest` bounds the length where the request
    has none. Raises `TorchchatError` as `open_model` does, and for what the exporter does not write.
    """
    wished = parse_recipe(request.quantize, registry) if request.quantize is not None else None
    device = chosen_device(request, wished, otherwise="cpu")
    files = fetch_files(request, registry)
    checkpoint = open_checkpoint(request, files, registry)
    asked = wished_dtype(request, wished)
    dtype = choose_dtype(asked, device, checkpoint.dtype) if asked else stored_dtype(checkpoint.dtype)
    recipe = _settled(wished, request, checkpoint, registry, device, dtype)
    schemes = _schemes(recipe, checkpoint)
    require_export(exporter, device, dtype, schemes, registry, is_layered(checkpoint))
    limit, original = request.max_seq_length, _dynamic_context(checkpoint.config)
    if limit is not None:
        _check_export_limit(exporter, limit, checkpoint.config.max_context)
    elif longest is not None:
        config = checkpoint.config  # with a window, runtimes export no more positions than it has
        limit = min(longest, config.max_context, config.sliding_window or longest, original or longest)
    if original is not None and (limit is None or limit > original):
        raise beyond_dynamic(original, f"the exporter {quoted(exporter.name)} does not support",
                             f"--max-seq-length {original}" if exporter.stands_alone else
                             "run the model itself, with --executor eager")
    text = text_content(files, registry, checkpoint.config.vocab_size) if exporter.stands_alone else None
    module = build_model(checkpoint, TORCH_DTYPES[dtype], device)
    if recipe is not None:
        recipe.apply(module, _calibration(request, files, checkpoint, registry))
    exporter.make().export(ExportRequest(
        module=module, path=path, device=device, dtype=dtype, files=files, options=options,
        name=Path(files.ref.text).name, text=text, recipe=_recipe_content(wished, checkpoint), schemes=schemes,
        max_seq_length=limit))
    remember_export(path)
    return files


def _dynamic_context(config: ModelConfig) -> int | None:
    """Return the original context of a model with dynamic rope scaling, None for other models."""
    scaling = config.rope_scaling
    return scaling.original_context if scaling is not None and scaling.kind == "dynamic" else None


def _check_export_limit(exporter: ExporterInfo, limit: int, maximum: int) -> None:
    if not exporter.stands_alone:
        raise TorchchatError(f"--max-seq-length is {limit}, and the files of the exporter {quoted(exporter.name)} do "
                             "not "
                             "limit the length of a sequence", "leave it out, and give it when the model is run")
    checked_limit(limit, maximum)


def _recipe_content(wished: RecipeText | None, checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The recipe that the model was quantised with, now or when its folder was written."""
    if wished is not None:
        return wished.content if wished.sections else None
    return getattr(checkpoint, "recipe", None)


def quantise_model(request: ModelRequest, folder: Path, registry: Registry) -> tuple[ModelFiles, RecipeReport]:
    """Writes the model, quantised by the recipe of the request, to `folder`; what it was made of, and the report.

    The model is quantised for the device that the request or the recipe names, which need not be here. Raises
    `TorchchatError` as `open_model` does, and where the folder cannot be written.
    """
    from torchchat_core.quantization.writing import write_quantised

    if request.quantize is None:
        raise TorchchatError("no recipe was given", "give one with --quantize")
    wished = parse_recipe(request.quantize, registry)
    files = fetch_files(request, registry)
    checkpoint = open_checkpoint(request, files, registry)
    target = _target_device(request, wished)
    device = target if has_device(target) else "cpu"
    asked = wished_dtype(request, wished)
    dtype = choose_dtype(asked, device, checkpoint.dtype) if asked else stored_dtype(checkpoint.dtype)
    recipe = _settled(wished, request, checkpoint, registry, target, dtype)
    windows = _calibration(request, files, checkpoint, registry)
    module = build_model(checkpoint, TORCH_DTYPES[dtype], device)
    report = _applied(recipe, module, windows, checkpoint, dtype)
    calibrated_on = request.calibration.described(windows) if request.calibration and windows else None
    write_quantised(module, wished.content, report, files, registry, folder, dtype, calibrated_on)
    return files, report


def looks_at_text(request: ModelRequest, registry: Registry) -> bool:
    """Whether the recipe of the request is made with a calibration text; so is one whose sections have errors, which
    are told when it is used."""
    if request.quantize is None:
        return False
    wished = parse_recipe(request.quantize, registry)
    dtype = DTYPE_NAMES.get(wished_dtype(request, wished) or "", "fp32")
    try:
        return any(step.calibrated for step in wished.steps(registry, _target_device(request, wished), dtype))
    except TorchchatError:
        return True


@overload
def _settled(wished: RecipeText, request: ModelRequest, checkpoint: Checkpoint, registry: Registry, device: str,
             dtype: str) -> Recipe: ...
@overload
def _settled(wished: RecipeText | None, request: ModelRequest, checkpoint: Checkpoint, registry: Registry, device: str,
             dtype: str) -> Recipe | None: ...
def _settled(wished: RecipeText | None, request: ModelRequest, checkpoint: Checkpoint, registry: Registry, device: str,
             dtype: str) -> Recipe | None:
    if wished is None:
        if request.calibration is not None:
            raise TorchchatError("there is a calibration text, and no recipe that could look at it",
                                 "give one with --quantize")
        return None
    refuse_quantised(checkpoint, "it is not quantised again")
    return wished.settle(registry, device, dtype, calibrated=request.calibration is not None)


def _applied(recipe: Recipe, module: Transformer, windows: Calibration | None, checkpoint: Checkpoint, dtype: str
             ) -> RecipeReport:
    """Quantize the module, and add the size of its weights in the checkpoint's own dtype to the report."""
    report = recipe.apply(module, windows)
    size = report.bytes_before * checkpoint.dtype.itemsize // TORCH_DTYPES[dtype].itemsize
    return dataclasses.replace(report, bytes_in_files=size)


def _calibration(request: ModelRequest, files: ModelFiles, checkpoint: Checkpoint, registry: Registry
                 ) -> Calibration | None:
    """The calibration text as the model reads it, where there is one."""
    if request.calibration is None:
        return None
    tokenizer = read_text_format(files, registry, checkpoint.config.vocab_size).tokenizer
    return read_calibration(request.calibration, tokenizer, checkpoint.config.max_context)


def _target_device(request: ModelRequest, recipe: RecipeText) -> str:
    """The one to quantise for, which need not be here. Raises `TorchchatError` for an unknown one."""
    named = (recipe.device if request.device in FAST_DEVICES else request.device) or "cpu"
    if named in FAST_DEVICES:
        return "cpu"
    _check_named(named, request, recipe)
    return named


def _schemes(recipe: Recipe | None, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Of the quantised layers that the model will have."""
    if recipe is not None:
        return recipe.schemes
    return checkpoint.schemes if is_layered(checkpoint) else ()


def fetch_files(request: ModelRequest, registry: Registry, running: bool = False) -> ModelFiles:
    """Return the files of the requested model. Files that the user names replace those that are found.

    Named files, and the device if the model will be `running`, are checked before anything is downloaded. Local files
    are opened first, because an exported file declares what belongs to it.
    """
    named = [text for text in (request.checkpoint_path, request.model, DEFAULT_MODEL) if text is not None]
    reference = resolve(named[0], registry)
    source = registry.claim("schemes", reference.scheme)
    if source is None:
        raise TorchchatError(f"nothing installed fetches {quoted(reference.scheme)} references")
    if request.checkpoint_path is not None and request.model is not None:
        reference = dataclasses.replace(reference, text=request.model)  # says what the file is
    if request.hf_token is not None:
        reference = dataclasses.replace(reference, token=request.hf_token)
    params = _existing("--params-path", request.params_path)
    if params is not None:
        read_json(params, "give the model's config.json or params.json with --params-path")
    tokenizer = _existing("--tokenizer-path", request.tokenizer_path)
    if reference.scheme != "file":
        _existing("--adapter", request.adapter)
        if running and "device" not in request.defaults:
            choose_device(request.device)
    files: ModelFiles = source.make().fetch(reference)
    if params is not None:
        files = dataclasses.replace(files, config=params, config_chosen=True)
    if tokenizer is not None:
        files = dataclasses.replace(files, tokenizer=(tokenizer,))
    return files


def open_checkpoint(request: ModelRequest, files: ModelFiles, registry: Registry) -> Checkpoint:
    """The checkpoint in the files, with the adapter that was asked for merged into its weights as they are read, or
    with the layers that it holds quantised kept, where that was asked for."""
    checkpoint = open_files(files, registry)
    if request.keep_quantized:
        checkpoint = keep_quantised(checkpoint, files.weights[0].name)
    if request.adapter is None:
        return checkpoint
    from torchchat_core.sources.adapters import with_adapter

    refuse_quantised(checkpoint, "no adapter can be merged into it")
    _existing("--adapter", request.adapter)
    return with_adapter(checkpoint, expanded(request.adapter))


def open_files(files: ModelFiles, registry: Registry) -> Checkpoint:
    """The checkpoint in the files, by the source that knows their format."""
    if exported_file(files) is not None:
        raise TorchchatError(f"{files.weights[0].name} is an exported file: it can be run, and nothing can be made of "
                             "it", "use the model that it was made of")
    source = registry.claim("formats", files.format)
    if source is None:
        raise TorchchatError(f"nothing installed opens {quoted_path(files.weights[0].name)}: the format "
                             f"{quoted(files.format)} is of "
                             "no installed model source", registry.how_to_get("formats", files.format)
                             or "give a .safetensors, .bin, .pt, .pth, .gguf or exported file, or a folder")
    checkpoint: Checkpoint = source.make().open(files)
    return checkpoint


def chosen_device(request: ModelRequest, recipe: RecipeText | None, otherwise: str = "fast") -> str:
    """The one that was asked for; where that is any, the recipe's, and where it names none, `otherwise`."""
    if request.device not in FAST_DEVICES:
        return choose_device(request.device)
    named = recipe.device if recipe is not None else None
    if recipe is not None and named is not None:
        _check_named(named, request, recipe)
        if named in DEVICES and not has_device(named):
            raise TorchchatError(f"the recipe {quoted(request.quantize)} needs the device {named}, which is not "
                                 "available on this machine or in this build of PyTorch",
                                 f"choose another recipe, or add --device {choose_device('fast')}")
    return choose_device(named or otherwise)


def _check_named(device: str, request: ModelRequest, recipe: RecipeText) -> None:
    """Raise `TorchchatError` for an unknown device. It names the recipe if that sets the device."""
    if request.device not in FAST_DEVICES or recipe.device is None:
        check_device(device)
        return
    try:
        check_device(device, '"executor": {{"accelerator": "{}"}} in the recipe')
    except TorchchatError as error:
        raise TorchchatError(f"the recipe {quoted(request.quantize)}: {error.message}", error.fix) from None


def wished_dtype(request: ModelRequest, recipe: RecipeText | None) -> str | None:
    """Return the requested dtype, else the recipe's. Raises `TorchchatError` if the recipe's is unknown."""
    if request.dtype is not None or recipe is None or recipe.dtype is None:
        return request.dtype
    try:
        check_dtype(recipe.dtype, suggested='"precision": {{"dtype": "{}"}} in the recipe')
    except TorchchatError as error:
        raise TorchchatError(f"the recipe {quoted(request.quantize)}: {error.message}", error.fix) from None
    return recipe.dtype


def choose_device(name: str) -> str:
    """ "fast" is the GPU where there is one. Raises `TorchchatError` for one that this machine lacks."""
    available = [device for device in ("cuda", "mps", "cpu") if has_device(device)]
    if name in FAST_DEVICES:
        return available[0]
    check_device(name)
    if name not in available:
        raise TorchchatError(f"this machine, or this build of PyTorch, has no {name} device",
                             f"use --device {available[0]}")
    return name


def has_device(device: str) -> bool:
    """Whether this machine, and this build of PyTorch, has the device."""
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or (device == "mps" and torch.backends.mps.is_available())


def choose_dtype(name: str | None, device: str, stored: torch.dtype) -> str:
    """The name in `specs.DTYPES` for what was asked for: without a wish, what the checkpoint has.

    Half precision that the device computes slowly becomes bfloat16 (float16 on a CPU) or, with "fast", whatever the
    device is fastest with.
    """
    if name == "fast":
        return _fastest_dtype(device)
    if name == "fast16":
        return _fastest_dtype(device) if device != "cpu" else "bf16"
    if name is not None:
        check_dtype(name)
        return DTYPE_NAMES[name]
    own = stored_dtype(stored)
    return "bf16" if own == "fp16" and device == "cpu" else own


def stored_dtype(stored: torch.dtype) -> str:
    """The name in `specs.DTYPES` for what a checkpoint has; float32 for one that models are not run in."""
    return next((known for known, dtype in TORCH_DTYPES.items() if dtype == stored), "fp32")


def _fastest_dtype(device: str) -> str:
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device == "mps":
        return "fp16"
    return "bf16" if torch.backends.mkldnn.is_available() else "fp32"


def checked_limit(asked: int | None, maximum: int) -> int:
    if asked is None:
        return maximum
    if not 1 <= asked <= maximum:
        raise TorchchatError(f"--max-seq-length is {asked}; the model takes 1 to {maximum}")
    return asked


def _existing(flag: str, path: str | None) -> Path | None:
    """Return the path given with a flag, or None without one. Raises `TorchchatError` if there is no such file."""
    if not path:
        return None
    found = expanded(path)
    if not (found.is_file() or (flag == "--adapter" and found.is_dir())):
        error = missing_file(found)
        raise TorchchatError(f"{flag}: {error.message}", error.fix)
    return found
