"""From an exported file to a model that runs: nothing is built, and what the file holds is not changed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torchchat_core.artifact_checks import check_once
from torchchat_core.artifacts import Artifact, Manifest, open_artifact
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.first_load import remember, try_first
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import parse_recipe, stored_recipe
from torchchat_core.specs import ExecutorInfo, LoadedModel, LoadRequest, ModelFiles
from torchchat_core.support import choose_executor
from torchchat_core.text_content import text_format_of

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest, OpenedModel

FIXED = {"params_path": "configuration", "tokenizer_path": "tokenizer", "adapter": "weights",
         "calibration": "weights", "keep_quantized": "weights"}  # what a request cannot change, and where that is
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}


@contextmanager
def open_exported(request: ModelRequest, files: ModelFiles, registry: Registry) -> Iterator[OpenedModel]:
    """The model in an exported file, loaded by an executor that reads such files.

    Raises `TorchchatError` where the file is damaged, changed, or made for another machine, where no installed
    executor reads it, and where the request asks for what the file is not.
    """
    from torchchat_core.pipeline import OpenedModel, checked_limit

    artifact = open_artifact(files.weights[0])
    manifest = artifact.manifest
    _check_request(request, artifact, registry)
    limit = checked_limit(request.max_seq_length, manifest.max_seq_length)
    artifact.check_target()
    executor = _executor(request, artifact, registry)
    check_once(artifact)
    if manifest.text is None:
        raise TorchchatError(f"{artifact.path.name} holds no tokenizer", "export it with torchchat export")
    text_format = text_format_of(manifest.text, registry)
    try_first(artifact, executor.name, registry)
    model: LoadedModel = executor.make().load(
        LoadRequest(device=manifest.target.device, dtype=manifest.dtype, artifact=artifact.path))
    try:
        remember(artifact)
        yield OpenedModel(name=files.ref.text, model=model, text_format=text_format, executor=executor,
                          max_seq_length=limit, weight_bytes=manifest.weight_bytes,
                          token_bytes=_token_bytes(manifest), schemes=tuple(manifest.schemes), recipe=stored_recipe(
                              manifest.recipe, manifest.schemes, registry, manifest.target.device, manifest.dtype))
    finally:
        model.close()


def _token_bytes(manifest: Manifest) -> int:
    """Bytes of the weights that one token reads, as `OpenedModel.token_bytes`; scales of a quantised embedding, which
    the manifest does not tell apart, count as read."""
    config = manifest.config
    bits = [int(scheme.removeprefix("embedding:int")) for scheme in manifest.schemes
            if scheme.startswith("embedding:int")]
    if config.tied_embeddings and not bits:
        return manifest.weight_bytes
    width = bits[0] if bits else BITS[manifest.dtype]
    return max(0, manifest.weight_bytes - config.vocab_size * config.hidden_size * width // 8)


def _executor(request: ModelRequest, artifact: Artifact, registry: Registry) -> ExecutorInfo:
    manifest, name = artifact.manifest, "auto" if "executor" in request.defaults else request.executor
    readers = [info.name for info in registry.infos(ExecutorInfo) if manifest.kind in info.reads]
    if not readers:
        raise TorchchatError(f"{artifact.path.name} is {manifest.described()}, and nothing installed runs "
                             f"{manifest.kind} files", registry.how_to_get("reads", manifest.kind))
    if name != "auto" and manifest.kind not in registry.find(ExecutorInfo, name).reads:
        raise TorchchatError(f"{artifact.path.name} is {manifest.described()}, which the executor {quoted(name)} does "
                             "not "
                             "run", f"leave --executor out: {' or '.join(readers)} runs it")
    return choose_executor(name, manifest.target.device, manifest.dtype, manifest.schemes, registry, stored=True,
                           format=manifest.kind)


def _check_request(request: ModelRequest, artifact: Artifact, registry: Registry) -> None:
    """Raises `TorchchatError` for a wish that another file would have to be exported for."""
    from torchchat_core.models.weights import TORCH_DTYPES
    from torchchat_core.pipeline import choose_dtype

    manifest = artifact.manifest
    for name, part in FIXED.items():
        if getattr(request, name):
            raise _refused(artifact, f"--{name.replace('_', '-')}", f"its {part} cannot be changed")
    asked = None if "dtype" in request.defaults else request.dtype
    computed = TORCH_DTYPES[manifest.dtype]  # "fast" leaves the choice open; "fast16" asks for half precision
    if asked not in (None, "fast") and choose_dtype(asked, manifest.target.device, computed) != manifest.dtype:
        raise _refused(artifact, f"--dtype {asked}", f"it computes in {manifest.dtype}")
    device = "fast" if "device" in request.defaults else request.device
    if device not in ("fast", "auto", manifest.target.device):
        raise _refused(artifact, f"--device {device}", f"it runs on {manifest.target.device}")
    if request.quantize is not None and not _is_recipe_of(request.quantize, manifest, registry):
        what = f"it is quantised already ({', '.join(manifest.schemes)})" if manifest.schemes else "it is not quantised"
        raise _refused(artifact, f"--quantize {shlex.quote(request.quantize)}", what)


def _is_recipe_of(text: str, manifest: Manifest, registry: Registry) -> bool:
    return manifest.recipe is not None and dict(parse_recipe(text, registry).content) == dict(manifest.recipe)


def _refused(artifact: Artifact, flag: str, why: str) -> TorchchatError:
    return TorchchatError(f"{artifact.path.name} is {artifact.manifest.described()}, and {flag} was given: {why}",
                          f"leave {flag.split()[0]} out, or export the model with it")
