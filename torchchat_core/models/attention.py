"""Implementations of `Attend`: over the caches of running sequences, and over whole rows for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import KVCache


@dataclass(frozen=True)
class Segment:
    """`count` tokens of one sequence that stand side by side in the flat row."""

    cache: KVCache
    count: int


class CachedAttention:
    """Attention of tokens of one or several sequences, each to its own cache and to those before it in the row.

    The keys and values of this step are written to the caches. A cache's `length` moves on only when its owner
    says so with `KVCache.advance`, after the last layer.
    """

    def __init__(self, config: ModelConfig, segments: Sequence[Segment]) -> None:
        self.config = config
        self.segments = segments
        self._places: dict[tuple[int, int | None], Tensor] = {}

    def place(self, layer: int, cache: KVCache) -> Tensor:
        """Where the tokens of a sequence stand, for operators: int64 [2], positions held, and the window or 0."""
        key = (id(cache), self.config.layer_window(layer))
        if key not in self._places:
            self._places[key] = torch.tensor([cache.length, key[1] or 0])
        return self._places[key]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if len(self.segments) == 1:
            return self._attend(layer, self.segments[0].cache, query, key, value)
        counts = [segment.count for segment in self.segments]
        rows = zip(self.segments, query.split(counts), key.split(counts), value.split(counts), strict=True)
        return torch.cat([self._attend(layer, segment.cache, *tensors) for segment, *tensors in rows])

    def _attend(self, layer: int, cache: KVCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, heads, head_dim], key and value [n, kv_heads, head_dim] -> [n, heads * head_dim]."""
        keys, values = cache.write(layer, key, value)  # [kv_heads, length + n, head_dim]
        window = self.config.layer_window(layer)
        if query.shape[0] == 1:
            return attend_one(query, keys, values, self.config.attention_scale, window)
        return attend_many(query, keys, values, self.config.attention_scale, window)


class KernelAttention(CachedAttention):
    """The same by core's CPU kernels, which put keys and values into the caches themselves.

    One token of each of several sequences is one call: with many small ones, calls are what takes the time.
    """

    def __init__(self, config: ModelConfig, segments: Sequence[Segment]) -> None:
        super().__init__(config, segments)
        self._side_by_side = len(segments) > 1 and all(segment.count == 1 for segment in segments)
        if self._side_by_side:
            self._rooms = [segment.cache.all_rooms(1) for segment in segments]
            self._held = [segment.cache.length for segment in segments]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self._side_by_side:
            return super().__call__(layer, query, key, value)
        context: Tensor = torch.ops.torchchat.batched_attention(
            query, key, value, [keys[layer] for keys, _ in self._rooms], [values[layer] for _, values in self._rooms],
            self._held, self.config.layer_window(layer) or 0, self.config.attention_scale)
        return context

    def _attend(self, layer: int, cache: KVCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = cache.room(layer, query.shape[0])  # [kv_heads, capacity, head_dim]
        context: Tensor = torch.ops.torchchat.cached_attention(query, key, value, keys, values,
                                                               self.place(layer, cache), self.config.attention_scale)
        return context


def attend_one(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """One token to all that the cache holds: query [1, heads, head_dim], keys [kv_heads, length, head_dim].

    The query heads that share a key head stand as rows of one small matrix, so that no key is repeated.
    """
    if window is not None and keys.shape[1] > window:
        keys, values = keys[:, -window:], values[:, -window:]
    grouped = query.view(keys.shape[0], -1, query.shape[2])  # [kv_heads, group, head_dim]
    context = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], scale=scale)
    return context.reshape(1, -1)


def attend_many(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """The last n tokens of a sequence, causally: query [n, heads, head_dim], keys [kv_heads, length, head_dim]."""
    count, length = query.shape[0], keys.shape[1]
    grouped = query.shape[1] != keys.shape[0]
    masked = count != length or (window is not None and length > window)
    context = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None],
        attn_mask=causal_mask(count, length, window, query.device) if masked else None,
        is_causal=not masked, scale=scale, enable_gqa=grouped,
    )  # [1, heads, n, head_dim]
    return context[0].transpose(0, 1).reshape(count, -1)


def causal_mask(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """True where the last `count` of `length` tokens may look: [count, length]."""
    column = torch.arange(length, device=device)
    row = torch.arange(length - count, length, device=device)[:, None]
    visible = column <= row
    return visible if window is None else visible & (column > row - window)


class RowAttention:
    """Causal attention inside rows of equal length, without a cache: for training and for scoring whole batches.

    The flat row of tokens is `rows` sequences of the same length, one after the other.
    """

    def __init__(self, config: ModelConfig, rows: int) -> None:
        self.config = config
        self.rows = rows

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (query, key, value))
        length, window = query.shape[2], self.config.layer_window(layer)
        masked = window is not None and length > window
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=causal_mask(length, length, window, query.device) if masked else None,
            is_causal=not masked, scale=self.config.attention_scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # [rows, heads, length, head_dim]
        return context.transpose(1, 2).reshape(self.rows * length, -1)
