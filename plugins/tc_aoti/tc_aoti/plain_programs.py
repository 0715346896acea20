"""Programs of PyTorch's own operators alone, for devices that core has no kernels for: CUDA.

Beside the inputs of the programs for CPUs they take the positions that are seen, int64 [held + n]: its length says in
how much of the cache attention looks, without waiting for the device to tell it. Everything is on the device.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tc_aoti.programs import EXAMPLE_ROWS, EXAMPLE_TOKENS, Program, SwitchedRotary
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import QuantizedLinear, meaning, rounded_rows

EXAMPLE_HELD = 5


class PlainProgram(Program):
    """All layers, for `tokens` tokens or any number of them; the first three inputs are tokens, place and seen."""

    sees = True

    def __init__(self, module: Transformer, dtype: torch.dtype) -> None:
        super().__init__(module.config, {**dict(module.named_parameters()), **dict(module.named_buffers())}, dtype)
        self.__dict__["module"] = module  # whose weights are inputs, and no part of this one

    def more_example(self) -> tuple[Tensor, ...]:
        seen = EXAMPLE_HELD + (self.tokens or EXAMPLE_TOKENS)
        return (torch.arange(seen), *super().more_example())

    def layers(self, tokens: Tensor, place: Tensor, seen: Tensor, rows: Tensor | None, keys: list[Tensor],
               values: list[Tensor], weights: list[Tensor]) -> Tensor:
        """Logits float32 [rows, vocab], of all tokens without `rows`."""
        module: Transformer = self.__dict__["module"]
        positions = place[0] + torch.arange(tokens.shape[0], device=tokens.device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys[layer][:, positions] = key.transpose(0, 1)
            values[layer][:, positions] = value.transpose(0, 1)
            unseen = seen > positions[:, None]  # [n, held + n]
            window = self.config.layer_window(layer)
            if window is not None:
                unseen = unseen | (seen <= positions[:, None] - window)
            held = [cache.narrow(1, 0, seen.shape[0]) for cache in (keys[layer], values[layer])]
            return _attention(query * self.config.attention_scale, held[0], held[1], unseen)

        named = dict(zip(self.weights, weights, strict=True))
        logits: Tensor = torch.func.functional_call(module, named, (tokens, positions, attend, rows, place[1]))
        return logits.float()


def _attention(query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor) -> Tensor:
    """query [n, heads, head_dim], keys and values [kv_heads, length, head_dim], unseen [n, length], true where a token
    must not look -> [n, heads * head_dim]. The query heads of a key head are rows of one product."""
    count, heads, size = query.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    grouped = query.view(count, kv_heads, group, size).permute(1, 2, 0, 3).reshape(kv_heads, group * count, size)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(kv_heads, group, count, length)
    shares = scores.float().masked_fill(unseen, float("-inf")).softmax(-1).to(values.dtype)
    context = torch.bmm(shares.view(kv_heads, group * count, length), values).view(kv_heads, group, count, size)
    return context.permute(2, 0, 1, 3).reshape(count, heads * size)


class PlainLayers(PlainProgram):
    """Any number of tokens of one sequence, layer by layer; its fourth input is rows, as of `programs.Layers`."""

    name, tokens = "any", None

    def more_example(self) -> tuple[Tensor, ...]:
        return (*super().more_example(), torch.zeros(EXAMPLE_ROWS, dtype=torch.int64))

    def forward(self, tokens: Tensor, place: Tensor, seen: Tensor, rows: Tensor, keys: list[Tensor],
                values: list[Tensor], weights: list[Tensor]) -> Tensor:
        return self.layers(tokens, place, seen, rows, keys, values, weights)


class PlainDecoding(PlainProgram):
    """One token: products of one row become sums over columns, which read weights as fast as the memory gives them."""

    name, tokens = "decode", 1

    def forward(self, tokens: Tensor, place: Tensor, seen: Tensor, keys: list[Tensor], values: list[Tensor],
                weights: list[Tensor]) -> Tensor:
        return self.layers(tokens, place, seen, None, keys, values, weights)


class OneRowLinear(nn.Module):
    """A `QuantizedLinear` for one row, as sums over columns: the compiler makes one loop of them and of what the
    integers mean, so that weights are read as they are stored, and stand nowhere else."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.format, self.columns, self.bias = layer.format, layer.columns, layer.bias
        for name in ("values", "scales", "centres"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        row = rounded_rows(x) if self.format.activations == "int8" else x
        weights = meaning(self.values, self.scales, self.centres, self.columns, self.format)  # type: ignore[arg-type]
        product = (weights * row.float()).sum(-1)[None].to(x.dtype)
        return product if self.bias is None else product + self.bias


def plain_programs_of(module: Transformer, dtype: torch.dtype) -> list[Program]:
    """The programs of a model for the device that it is on; its rotary embedding is replaced.

    Quantised layers are those that are stored: kernels that are compiled when they run are no part of a file.
    """
    module.model.rotary = SwitchedRotary(module.model.rotary)  # type: ignore[assignment]
    tensors = [*module.parameters(), *module.buffers()]
    one = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for name, layer in list(one.named_modules()):
        if isinstance(layer, QuantizedLinear):
            one.set_submodule(name, OneRowLinear(layer))
    return [PlainLayers(module, dtype), PlainDecoding(one, dtype)]
