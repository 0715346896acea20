"""Writing a quantised model as a folder that `saved` opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import Transformer
from torchchat_core.plugins import Registry
from torchchat_core.quantization.layers import QuantizedLayer
from torchchat_core.quantization.recipe import RecipeReport
from torchchat_core.quantization.saved import MANIFEST, VERSION
from torchchat_core.sources.hugging_face_folder import check_room, new_folder
from torchchat_core.sources.safetensors_writer import SHARD_BYTES, write_safetensors
from torchchat_core.specs import ModelFiles

# For other programs: these weights are of nobody else's kind.
FOREIGN = {"quantization_config": {"quant_method": "torchchat"}}


def write_quantised(model: Transformer, recipe: Mapping[str, Any], report: RecipeReport, files: ModelFiles,
                    registry: Registry, folder: Path, dtype: str, calibration: Mapping[str, Any] | None = None,
                    shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json, the weights, the tokenizer's files, and what was quantised how and on which `calibration`.

    The folder appears whole or not at all. Raises `TorchchatError` where `folder` exists and is not empty, where it
    cannot be written, and for layers that are not core's.
    """
    manifest = {"version": VERSION, "recipe": recipe, **({"calibration": calibration} if calibration else {}),
                "dtype": dtype, "rope_interleaved": model.config.rope_interleaved, "layers": _layers(model, report)}
    tensors = _tensors(model)
    check_room(folder, sum(tensor.nbytes for tensor in tensors.values()))
    with new_folder(model.config, files, registry, folder, dtype, FOREIGN) as beside:
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        write_safetensors(beside, {name: tuple(tensor.shape) for name, tensor in tensors.items()},
                          {name: tensor.dtype for name, tensor in tensors.items()},
                          lambda name: tensors[name].cpu(), shard_bytes)


def _layers(model: Transformer, report: RecipeReport) -> dict[str, Any]:
    if not report.done:
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in report.left if layer.reason))
        raise TorchchatError("the recipe quantised no layer of this model" + (f": {reasons:.500}" if reasons else ""),
                             "choose another one, or `torchchat convert`")
    layers = {}
    for done in report.done:
        layer = model.get_submodule(done.name)
        if not isinstance(layer, QuantizedLayer):
            raise TorchchatError(f"layers of the scheme {done.scheme} cannot be written: they are a plugin's own",
                                 "give the recipe to `torchchat generate` or `chat` with --quantize")
        layers[done.name] = {"scheme": done.scheme, "format": asdict(layer.format)}
    return layers


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """By name; a matrix that is input and output embedding once, under the input's name."""
    tensors = dict(model.state_dict())
    embedding, head = (tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if model.config.tied_embeddings and embedding is not None and head is not None:
        del tensors["lm_head.weight"]
    return tensors
