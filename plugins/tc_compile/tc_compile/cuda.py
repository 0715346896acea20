"""Decoding on a GPU: one token as a graph of kernels that is recorded once and started with a single call.

A recorded graph knows shapes and addresses, so it belongs to one sequence and to one size of its cache. The cache grows
by doubling: a sequence needs a handful of graphs, and what they attend to is at most twice what is held. The compiled
code behind them is the same for all sequences, and PyTorch keeps it across starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.transformer import Transformer

Replay = Callable[[], None]
WARM_UPS = 3  # before recording: kernels are chosen and workspaces taken then


class StaticAttention:
    """An `Attend` for one token whose shapes never change: to all of the cache's memory, behind a mask.

    `position` [1] int64 is where the token stands; keys and values of each layer are [kv_heads, capacity, head_dim].
    """

    def __init__(self, config: ModelConfig, position: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.config, self.position, self.keys, self.values = config, position, keys, values

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(1, self.position, key.transpose(0, 1))
        values.index_copy_(1, self.position, value.transpose(0, 1))
        grouped = query.view(keys.shape[0], -1, query.shape[2])  # [kv_heads, group, head_dim]
        context = F.scaled_dot_product_attention(grouped[None], keys[None], values[None],
                                                 attn_mask=self._visible(layer, keys.shape[1]),
                                                 scale=self.config.attention_scale)
        return context.reshape(1, -1)

    def _visible(self, layer: int, capacity: int) -> Tensor:
        """True for the positions that the token sees: [1, capacity]."""
        column = torch.arange(capacity, device=self.position.device)
        visible = column <= self.position
        window = self.config.layer_window(layer)
        return (visible if window is None else visible & (column > self.position - window))[None]


def decode_step(module: Transformer, token: Tensor, position: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor],
                extended: bool) -> Tensor:
    """token and position [1] int64 -> logits [1, vocab] float32; key and value go into the caches."""
    attend = StaticAttention(module.config, position, keys, values)
    logits: Tensor = module(token, position, attend, extended=extended)
    return logits.float()


@dataclass
class Recorded:
    """A graph, and the memory that it reads and writes."""

    key: tuple[int, bool]  # capacity of the cache, and whether longrope's other angles are used
    token: Tensor  # [1] int64
    position: Tensor  # [1] int64
    logits: Tensor  # [1, vocab] float32
    replay: Replay


class GraphDecoder:
    """What tc-eager's model calls for one token of one sequence; other steps go the ordinary way."""

    def __init__(self, module: Transformer, device: str, step: Callable[..., Tensor] | None = None,
                 record: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] | None = None) -> None:
        """`step` is a compiled `decode_step` unless another one is given, and `record` records CUDA graphs."""
        self._module, self._device = module, device
        self._step = step or cast(Callable[..., Tensor], torch.compile(decode_step, fullgraph=True, dynamic=False))
        self._record = record or record_cuda_graph
        self._recorded: WeakKeyDictionary[KVCache, Recorded] = WeakKeyDictionary()

    def logits(self, token: int, cache: KVCache, extended: bool) -> Tensor:
        """Of the token behind those that the cache holds: float32 [1, vocab] on the CPU.

        Raises `TorchchatError` where the cache is full; `cache.advance` is left to the caller.
        """
        keys, values = cache.all_rooms(1)
        key = (keys[0].shape[1], extended)
        recorded = self._recorded.get(cache)
        if recorded is None or recorded.key != key:
            recorded = self._recorded[cache] = self._made(key, keys, values, cache.length)
        recorded.token.fill_(token)
        recorded.position.fill_(cache.length)
        recorded.replay()
        return recorded.logits.to("cpu", copy=True)  # the next replay writes to that memory

    def _made(self, key: tuple[int, bool], keys: Sequence[Tensor], values: Sequence[Tensor], length: int) -> Recorded:
        """Recording runs the step for the next position, whose keys and values are written again afterwards.

        What is behind the mask counts with weight zero, so it must not be what memory happened to hold.
        """
        for each in (*keys, *values):
            each[:, length:].zero_()
        token = torch.zeros(1, dtype=torch.int64, device=self._device)
        position = torch.full_like(token, length)
        caches = list(keys), list(values)
        replay, logits = self._record(lambda: self._step(self._module, token, position, *caches, key[1]))
        return Recorded(key, token, position, logits, replay)


def record_cuda_graph(step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """What starts the recorded step again, and the memory of its result."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph.replay, logits
