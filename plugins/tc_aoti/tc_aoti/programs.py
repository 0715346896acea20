"""The programs of a file: functions of tokens, cache and weights, ready to be traced.

Both take tokens int64 [n]; place int64 [2], which is the positions that the cache holds and whether the sequence may
reach beyond the context that longrope models were trained with; and a layer's keys and values as
[kv_heads, capacity, head_dim], to which they write behind what is held. Weights are inputs, so that they stand in the
file once, and stay mapped to it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.decoding import decoder_parts, decodes
from torchchat_core.kernels.layers import use_kernel_linear
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rotary import RotaryEmbedding
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.quantization.running import prepare

EXAMPLE_TOKENS, EXAMPLE_ROWS, EXAMPLE_CAPACITY = 3, 2, 256


class Program(nn.Module, ABC):
    """One program. `weights` are its inputs behind the cache, in this order, by their names in the file."""

    name: str
    tokens: int | None  # that it takes at a time; None: any number
    sees = False  # whether the positions that are seen are an input

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.weights, self.dtype = config, weights, dtype
        self.device = next(iter(weights.values())).device

    def example(self) -> tuple[Any, ...]:
        """Inputs to trace it with."""
        config, count = self.config, self.tokens or EXAMPLE_TOKENS
        shape = (config.num_kv_heads, EXAMPLE_CAPACITY, config.head_dim)
        with self.device:
            cache = [[torch.zeros(shape, dtype=self.dtype) for _ in range(config.num_layers)] for _ in range(2)]
            return (torch.zeros(count, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), *self.more_example(),
                    *cache, list(self.weights.values()))

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Which sizes of the inputs are open."""
        count, open_size = None if self.tokens else {0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
        caches = [[{1: torch.export.Dim.DYNAMIC}] * self.config.num_layers] * 2
        return (count, None, *(open_size for _ in self.more_example()), *caches, [None] * len(self.weights))

    def more_example(self) -> tuple[Tensor, ...]:
        """Inputs between place and the cache, whose first size is open."""
        return ()

    @abstractmethod
    def forward(self, *inputs: Any) -> Tensor: ...


class Layers(Program):
    """Any number of tokens of one sequence, layer by layer.

    Its third input is rows int64 [m], of the tokens whose logits are wanted: -> logits float32 [m, vocab].
    """

    name, tokens = "any", None

    def __init__(self, module: Transformer, dtype: torch.dtype) -> None:
        super().__init__(module.config, {**dict(module.named_parameters()), **dict(module.named_buffers())}, dtype)
        self.__dict__["module"] = module  # whose weights are inputs, and no part of this one

    def more_example(self) -> tuple[Tensor, ...]:
        return (torch.zeros(EXAMPLE_ROWS, dtype=torch.int64),)

    def forward(self, tokens: Tensor, place: Tensor, rows: Tensor, keys: list[Tensor], values: list[Tensor],
                weights: list[Tensor]) -> Tensor:
        module: Transformer = self.__dict__["module"]
        config = self.config

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            here = F.pad(place[:1], (0, 1), value=config.layer_window(layer) or 0)
            context: Tensor = torch.ops.torchchat.cached_attention(query, key, value, keys[layer], values[layer], here,
                                                                   config.attention_scale)
            return context

        named = dict(zip(self.weights, weights, strict=True))
        positions = place[0] + torch.arange(tokens.shape[0])
        logits: Tensor = torch.func.functional_call(module, named, (tokens, positions, attend, rows, place[1]))
        return logits.float()


class Decoding(Program):
    """One token, all layers by one operator of core's kernels: -> logits float32 [1, vocab]."""

    name, tokens = "decode", 1

    def __init__(self, module: Transformer, dtype: torch.dtype, names: dict[int, str]) -> None:
        """`names`: of tensors in memory, by address, that have one in the file already."""
        self.parts = parts = decoder_parts(module)
        embedding = module.model.embed_tokens
        own = {**dict(embedding.named_parameters()), **dict(embedding.named_buffers())}
        weights = {f"model.embed_tokens.{name}": tensor for name, tensor in own.items()}
        rotary = {f"model.rotary.{name}": tensor for name, tensor in module.model.rotary.named_buffers()}
        decoder = {names.get(tensor.data_ptr(), f"decoder.{index}"): tensor
                   for index, tensor in enumerate(parts.tensors)}
        super().__init__(module.config, {**weights, **rotary, **decoder}, dtype)
        self.order = [names.get(tensor.data_ptr(), f"decoder.{index}") for index, tensor in enumerate(parts.tensors)]
        self.__dict__["embedding"], self.__dict__["rotary"] = embedding, module.model.rotary

    @property
    def embedding(self) -> nn.Module:
        """Whose weights are inputs, and no part of this one."""
        return cast(nn.Module, self.__dict__["embedding"])

    def forward(self, tokens: Tensor, place: Tensor, keys: list[Tensor], values: list[Tensor], weights: list[Tensor]
                ) -> Tensor:
        named = dict(zip(self.weights, weights, strict=True))
        cos, sin = _called(self.__dict__["rotary"], "model.rotary.", named, (place[:1], place[1]))
        hidden: Tensor = _called(self.embedding, "model.embed_tokens.", named, (tokens,))
        if self.config.embedding_multiplier != 1.0:
            hidden = hidden * self.config.embedding_multiplier
        logits: Tensor = torch.ops.torchchat.decode_token(hidden, cos, sin, [named[name] for name in self.order],
                                                          self.parts.numbers, self.parts.scalars, keys, values, place)
        return logits


class SwitchedRotary(nn.Module):
    """`RotaryEmbedding` whose `extended` is a number on a tensor, so that a graph holds for both."""

    short: Tensor
    long: Tensor

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.register_buffer("short", rotary.short)
        self.switches = rotary.original_context is not None
        if self.switches:
            self.register_buffer("long", rotary.long)
        self.__dict__["rotary"] = rotary

    def forward(self, positions: Tensor, extended: Tensor) -> tuple[Tensor, Tensor]:
        """positions [n] -> cos, signed sin, each [n, 1, head_dim] float32."""
        frequencies = torch.where(extended != 0, self.long, self.short) if self.switches else self.short
        rotary: RotaryEmbedding = self.__dict__["rotary"]
        angles: tuple[Tensor, Tensor] = torch.func.functional_call(rotary, {"short": frequencies}, (positions, False))
        return angles


def _called(module: nn.Module, prefix: str, named: dict[str, Tensor], arguments: tuple[Any, ...]) -> Any:
    own = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    return torch.func.functional_call(module, own, arguments)


def programs_of(module: Transformer, dtype: str) -> list[Program]:
    """The programs of a model, which stays as it is: what runs fast takes the place of its layers in a copy.

    On a CPU the second program, for one token, is there where core's decoder knows all of the layers. Raises
    `TorchchatError` where the kernels that they call cannot be built.
    """
    tensors = [*module.parameters(), *module.buffers()]
    module = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})  # weights are shared
    if module.model.norm.weight.device.type != "cpu":
        from tc_aoti.plain_programs import plain_programs_of

        return plain_programs_of(module, TORCH_DTYPES[dtype])
    reason = kernels.load()
    if reason is not None:
        raise TorchchatError(f"AOTInductor's files call core's CPU kernels: {reason}")
    prepare(module, TORCH_DTYPES[dtype])
    use_kernel_linear(module)
    can_decode = decodes(module)
    module.model.rotary = SwitchedRotary(module.model.rotary)  # type: ignore[assignment]
    programs: list[Program] = [Layers(module, TORCH_DTYPES[dtype])]
    if can_decode:
        names = {tensor.data_ptr(): name for name, tensor in programs[0].weights.items()}
        programs.append(Decoding(module, TORCH_DTYPES[dtype], names))
    return programs
