"""Executors that read exported files alone run other models too: a model is exported once, and kept in the cache.

That is so where no installed executor reads models in memory, and where --executor names one that reads files. The file
is kept under a key of what it was made of: the model's files, the recipe, the lengths, and the versions of all that had
a part in it. It is a file as `torchchat export` writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchchat_core import progress
from torchchat_core.artifacts import ARTIFACT, has_manifest, this_machine
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.private_cache import make_code_folder, private_path
from torchchat_core.small_files import expanded
from torchchat_core.specs import ExecutorInfo, ExporterInfo, ModelFiles
from torchchat_core.support import IN_MEMORY
from torchchat_core.tokenizers.declared import ADDED, NAMES

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

FOLDER = "exported"  # in the cache folder
Way = tuple[ExecutorInfo, str, ExporterInfo]  # what runs the file, and what writes it, with its qualified name


def exported_once(request: ModelRequest, files: ModelFiles, registry: Registry
                  ) -> tuple[ModelRequest, ModelFiles] | None:
    """The request and the files of the exported model, where the request's executor reads only such; else None.

    Exports the model where that was never done. Raises `TorchchatError` where it cannot be exported or kept.
    """
    way = _way(request, registry)
    if way is None:
        return None
    executor, qualified, exporter = way
    path = private_path(FOLDER, f"{_key(request, files, qualified, registry)}{exporter.suffix}")
    if not has_manifest(path):
        _export(request, exporter, path, registry)
    plain = dataclasses.replace(request, executor=executor.name, device="fast", dtype=None, quantize=None, adapter=None,
                                params_path=None, tokenizer_path=None, calibration=None, keep_quantized=False,
                                defaults=request.defaults - {"executor"})
    return plain, dataclasses.replace(files, weights=(path,), format=ARTIFACT)


def _way(request: ModelRequest, registry: Registry) -> Way | None:
    executors = sorted(registry.infos(ExecutorInfo), key=lambda info: info.order)
    if request.executor != "auto":
        executors = [registry.find(ExecutorInfo, request.executor)]
    if any(IN_MEMORY in info.reads for info in executors):
        return None
    written = [(executor, qualified, exporter) for executor in executors
               for qualified, exporter in registry.settled(ExporterInfo)
               if exporter.writes in executor.reads and exporter.stands_alone]
    return written[0] if written else None


def _export(request: ModelRequest, exporter: ExporterInfo, path: Path, registry: Registry) -> None:
    from filelock import FileLock

    from torchchat_core.pipeline import export_model

    try:
        make_code_folder(path.parent)
        with FileLock(path.with_suffix(".lock")), progress.task(f"exporting with {exporter.name}, once"):
            if not has_manifest(path):  # another process may have been faster
                options = exporter.options() if exporter.options is not None else None
                export_model(request, exporter, path, options, registry)
    except OSError as error:
        raise TorchchatError(f"exported models cannot be kept in {path.parent}: {error.strerror or error}",
                             "set XDG_CACHE_HOME to a folder that can be written") from error


def _key(request: ModelRequest, files: ModelFiles, exporter: str, registry: Registry) -> str:
    """Of all that the exported file depends on."""
    from torchchat_core.quantization.recipe import parse_recipe

    machine = this_machine()
    parts: dict[str, Any] = {
        "files": [_identity(path, files, request) for path in _paths(request, files)],
        "calibration": request.calibration.tokens if request.calibration is not None else None,
        "recipe": parse_recipe(request.quantize, registry).content if request.quantize is not None else None,
        "dtype": request.dtype, "length": request.max_seq_length, "keep": request.keep_quantized,
        "device": request.device, "machine": [machine.system, machine.machine], "exporter": exporter,
        "versions": _versions(exporter.partition(":")[0]),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _paths(request: ModelRequest, files: ModelFiles) -> Iterator[Path]:
    named = (files.config, files.tokenizer_config, files.generation_config, files.chat_template)
    yield from (*files.weights, *files.tokenizer, *(path for path in named if path is not None))
    yield from files.more_chat_templates
    token_files = dict.fromkeys(path.parent / name for path in files.tokenizer for name in (NAMES, ADDED))
    yield from (path for path in token_files if path.is_file())
    if request.adapter is not None:
        yield from sorted(path for path in expanded(request.adapter).glob("*") if path.is_file())
    if request.calibration is not None:
        yield request.calibration.path


def _identity(path: Path, files: ModelFiles, request: ModelRequest) -> list[str | int]:
    """A file by its digest, or by place, size and time where nobody computed one. Digests go by names: a file that the
    user chose may have the name of one of the model's."""
    named = (request.tokenizer_path, request.params_path, request.adapter)
    chosen = [expanded(text) for text in named if text]
    if request.calibration is not None:
        chosen.append(request.calibration.path)
    models_own = path.is_relative_to(files.root) and not any(path.is_relative_to(each) for each in chosen)
    if models_own and path.name in files.digests:
        return [str(path.relative_to(files.root)), files.digests[path.name]]
    try:
        found = path.stat()
    except OSError as error:
        raise TorchchatError(f"{path} cannot be read: {error.strerror or error}") from error
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _versions(distribution: str) -> dict[str, str]:
    """Return the versions of a distribution, its requirements, core and PyTorch."""
    try:
        needed = [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0]
                  for text in importlib.metadata.requires(distribution) or ()]
    except importlib.metadata.PackageNotFoundError:  # a plugin without a distribution, as tests have them
        needed = []
    return {name: version for name in ("torchchat-core", "torch", distribution, *needed)
            if (version := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
