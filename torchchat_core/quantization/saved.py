"""Models that were quantised before: a folder in Hugging Face's layout whose integer weights need no quantising again.

Beside config.json and the safetensors stands `torchchat_quantisation.json`: the recipe that made the model, and for
each quantised layer its scheme and the format of its weights. The layer's tensors are called NAME.values, NAME.scales
and NAME.centres; they are mapped, as all weights are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.models.config import ModelConfig, config_from_hugging_face
from torchchat_core.quantization.layers import (
    IntegerWeights,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
    WeightFormat,
    format_from_json,
)
from torchchat_core.small_files import read_json
from torchchat_core.sources.checkpoints import StoredCheckpoint, Tensors
from torchchat_core.specs import SCHEME, ModelFiles, is_layered

MANIFEST = "torchchat_quantisation.json"
VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DAMAGED = "the folder is damaged; write it again with `torchchat quantize`"


@dataclass(frozen=True, kw_only=True)
class SavedLayer:
    """One quantised layer."""

    scheme: str
    format: WeightFormat


class QuantizedCheckpoint(StoredCheckpoint):
    """A `specs.LayeredCheckpoint`: some of its layers are stored as integers."""

    def __init__(self, config: ModelConfig, tensors: Tensors, layers: Mapping[str, SavedLayer], dtype: torch.dtype,
                 recipe: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, tensors)
        self.layers = layers
        self.recipe = recipe  # that they were made by
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """That the model was quantised from."""
        return self._dtype

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.scheme for layer in self.layers.values()))

    def put_layers(self, model: nn.Module, dtype: torch.dtype, device: str) -> set[str]:
        """As `specs.LayeredCheckpoint` has it."""
        names: set[str] = set()
        known = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
        for name, saved in self.layers.items():
            if name not in known:
                raise TorchchatError(f"{MANIFEST} names the layer {quoted(name)}, which the model does not have",
                                     did_you_mean(name[:100], known) or DAMAGED)
            layer = self._layer(name, saved, known[name], dtype).to(device)
            model.set_submodule(name, layer)
            names |= {f"{name}.{tensor}" for tensor, _ in (*layer.named_buffers(), *layer.named_parameters())}
        return names

    def _layer(self, name: str, saved: SavedLayer, plain: nn.Module, dtype: torch.dtype) -> QuantizedLayer:
        rows, columns = plain.get_parameter("weight").shape
        found = {part: self._part(f"{name}.{part}", shape, kind)
                 for part, (shape, kind) in saved.format.shapes(rows, columns).items()}
        weights = IntegerWeights(format=saved.format, columns=columns, **found)
        if isinstance(plain, nn.Embedding):
            return QuantizedEmbedding(weights, dtype)
        from torchchat_core.models.weights import fetch_weight

        biased = plain.bias is not None
        return QuantizedLinear(weights, fetch_weight(self, f"{name}.bias", (rows,), dtype) if biased else None)

    def _part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            tensor = self.tensor(name)
        except KeyError:
            raise TorchchatError(f"the checkpoint has no tensor {quoted(name)}", DAMAGED) from None
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise TorchchatError(f"tensor {quoted(name)} is {_words(tensor.dtype)} {list(tensor.shape)}; it has to be "
                                 f"{_words(dtype)} {list(shape)}", DAMAGED)
        return tensor


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def open_quantised(files: ModelFiles, tensors: Tensors) -> QuantizedCheckpoint:
    """The checkpoint of a folder that `torchchat quantize` wrote. Raises `TorchchatError` for a damaged one."""
    manifest = files.weights[0].parent / MANIFEST
    if not manifest.is_file() or files.config is None:
        missing = MANIFEST if not manifest.is_file() else "config.json"
        raise TorchchatError(f"{files.weights[0].name} holds quantised weights, and there is no {missing} beside it",
                             "copy the whole folder")
    content = read_json(manifest)
    if content.get("version") != VERSION:
        raise TorchchatError(f"{manifest} is of version {quoted(content.get('version'))}; this torchchat reads version "
                             f"{VERSION}", "use a newer torchchat, or quantise the model again")
    config = config_from_hugging_face(read_json(files.config))
    interleaved, dtype = content.get("rope_interleaved"), content.get("dtype")
    if not isinstance(interleaved, bool) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise TorchchatError(f"{manifest} does not say how the model computes", DAMAGED)
    config = dataclasses.replace(config, rope_interleaved=interleaved)
    recipe = content.get("recipe")
    return QuantizedCheckpoint(config, tensors, _layers(content.get("layers"), manifest), DTYPES[dtype],
                               recipe if isinstance(recipe, dict) else None)


def _layers(content: Any, manifest: Path) -> dict[str, SavedLayer]:
    if not isinstance(content, dict) or not content:
        raise TorchchatError(f"{manifest} names no layers", DAMAGED)
    layers = {}
    for name, layer in content.items():
        scheme = layer.get("scheme") if isinstance(layer, dict) else None
        if not isinstance(scheme, str) or not SCHEME.fullmatch(scheme):
            raise TorchchatError(f"{manifest} has no scheme for the layer {quoted(name)}", DAMAGED)
        layers[name] = SavedLayer(scheme=scheme, format=format_from_json(layer.get("format")))
    return layers


def refuse_quantised(checkpoint: object, purpose: str) -> None:
    """Raises `TorchchatError` for a checkpoint with quantised layers, which cannot be used for the purpose."""
    if is_layered(checkpoint):
        own = isinstance(checkpoint, QuantizedCheckpoint)
        raise TorchchatError(f"the model is quantised already ({', '.join(checkpoint.schemes)}); {purpose}",
                             "use the model that it was made of" if own else "leave --keep-quantized out")
