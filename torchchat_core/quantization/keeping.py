"""Quantised weights of a file that others made, run as they are: four bits stay four bits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.weights import check_shape, fetch_weight
from torchchat_core.quantization.blocks import FORMATS, BlockEmbedding, integer_weights
from torchchat_core.quantization.layers import QuantizedLinear
from torchchat_core.specs import Checkpoint, PackedCheckpoint, PackedTensor, is_layered, is_packed

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class KeptReport:
    """What became of the layers that a file holds quantised; names by block format, as people write it: "Q4_0"."""

    kept: Mapping[str, Sequence[str]]
    left: Mapping[str, Sequence[str]]  # unpacked, as core has no layers of that format
    beyond: Sequence[str] = ()  # unpacked, as their scales are beyond float16

    def line(self, dtype: str) -> str:
        """In one line, with what the others became."""
        counts = ", ".join(f"{len(names)} in {form}" for form, names in sorted(self.kept.items()))
        unpacked = [f"{form}, which is not run as it is ({', '.join(patterns(names))})"
                    for form, names in sorted(self.left.items())]
        if self.beyond:
            unpacked.append(f"scales beyond float16 ({', '.join(patterns(self.beyond))})")
        number = len(self.beyond) + sum(map(len, self.left.values()))
        rest = f"; {number} became {dtype}: {'; '.join(unpacked)}" if number else ""
        return f"layers kept as the file has them: {counts or 'none'}{rest}"


def patterns(names: Iterable[str]) -> list[str]:
    """Names without repetition: those of several decoder layers as "model.layers.*.mlp.down_proj"."""
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stems[re.sub(r"(?<=\.layers\.)\d+", "*", name)].append(name)
    return [stem if len(found) > 1 else found[0] for stem, found in stems.items()]


def keep_quantised(checkpoint: Checkpoint, name: str) -> KeptCheckpoint:
    """The checkpoint of the file `name` with its quantised layers kept. Raises `TorchchatError` without such layers."""
    if is_layered(checkpoint):
        raise TorchchatError(f"{name} was quantised by torchchat, and is always run as it is",
                             "leave --keep-quantized out")
    if not is_packed(checkpoint):
        raise TorchchatError(f"{name} holds no quantised weights that could be kept; GGUF files do",
                             "leave --keep-quantized out, or quantise it with --quantize")
    packed: PackedCheckpoint = checkpoint
    kept = KeptCheckpoint(packed)
    if not kept.schemes:
        found = sorted({form for each in packed.names() if (form := packed.block_format(each)) is not None})
        raise TorchchatError(f"{name} holds no weights in {', '.join(FORMATS).upper()}, which are run as they are; it "
                             f"holds {', '.join(found) or 'plain numbers'}", "leave --keep-quantized out")
    return kept


class KeptCheckpoint:
    """Implements `specs.LayeredCheckpoint` over a checkpoint of packed tensors."""

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        self.config: ModelConfig = checkpoint.config
        self._checkpoint = checkpoint
        self._beyond: list[str] = []

    @property
    def dtype(self) -> torch.dtype:
        return self._checkpoint.dtype

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._checkpoint.tensor(name, dtype)

    @property
    def schemes(self) -> tuple[str, ...]:
        """Of the layers that can be kept; none: there is nothing to keep."""
        formats = {name: FORMATS.get(form.lower()) for name, form in self._quantised().items()}
        return tuple(sorted({f"{'embedding' if name == EMBEDDING else 'linear'}:int{form.weights.bits}"
                             for name, form in formats.items() if form is not None}))

    @property
    def report(self) -> KeptReport:
        """After `put_layers`."""
        sorted_out: tuple[dict[str, list[str]], dict[str, list[str]]] = {}, {}
        for name, form in self._quantised().items():
            if name not in self._beyond:
                sorted_out[form.lower() not in FORMATS].setdefault(form, []).append(name)
        return KeptReport(kept=sorted_out[0], left=sorted_out[1], beyond=self._beyond)

    def put_layers(self, model: nn.Module, dtype: torch.dtype, device: str) -> set[str]:
        """As `specs.LayeredCheckpoint` has it; a layer that cannot be kept stays for others to fill."""
        there: set[str] = set()
        for name in self._quantised():
            layer = dict(model.named_modules()).get(name)
            if isinstance(layer, nn.Linear):
                there |= self._put_linear(model, name, layer, dtype, device)
        shared = self.config.tied_embeddings and f"{HEAD}.weight" not in there  # with a head that could not be kept
        embedding = model.get_submodule(EMBEDDING)
        packed = None if shared or not isinstance(embedding, nn.Embedding) else self._packed(EMBEDDING, embedding)
        if packed is not None:
            model.set_submodule(EMBEDDING, BlockEmbedding(packed, dtype).to(device))
            there.add(f"{EMBEDDING}.weight")
        return there

    def _put_linear(self, model: nn.Module, name: str, layer: nn.Linear, dtype: torch.dtype, device: str) -> set[str]:
        """The names of the tensors that the layer took, none where it could not be kept."""
        packed = self._packed(name, layer)
        if packed is None:
            return set()
        weights = integer_weights(packed)
        if weights is None:
            self._beyond.append(name)
            return set()
        bias = None
        if layer.bias is not None:
            bias = fetch_weight(self, f"{name}.bias", (layer.out_features,), dtype)
        model.set_submodule(name, QuantizedLinear(weights, bias).to(device))
        return {f"{name}.weight"} | ({f"{name}.bias"} if layer.bias is not None else set())

    def _packed(self, name: str, layer: nn.Module) -> PackedTensor | None:
        """Of the layer's weight; None where its format is not run. Raises `TorchchatError` for a wrong shape."""
        tensor = self._tensor_of(name)
        packed = self._checkpoint.packed(tensor) if tensor in set(self._checkpoint.names()) else None
        if packed is not None:
            check_shape(tensor, packed.shape, tuple(layer.get_parameter("weight").shape))
        return packed

    def _quantised(self) -> dict[str, str]:
        """Layer -> block format, of those whose matrix is quantised in the file."""
        found = {}
        for tensor in self._checkpoint.names():
            form = self._checkpoint.block_format(tensor)
            if form is not None and tensor.endswith(".weight"):
                found[tensor.removesuffix(".weight")] = form
        if self.config.tied_embeddings and EMBEDDING in found:
            found[HEAD] = found[EMBEDDING]
        return found

    def _tensor_of(self, name: str) -> str:
        return f"{EMBEDDING if name == HEAD and self.config.tied_embeddings else name}.weight"
