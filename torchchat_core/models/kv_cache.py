"""The keys and values of one sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig

FIRST_CAPACITY = 256  # positions


class KVCache:
    """Keys and values of all layers for one sequence of at most `limit` positions.

    Memory is taken as the sequence grows, by doubling, and attention sees the used part alone: neither depends on
    `limit`. One layer's keys are [kv_heads, capacity, head_dim].
    """

    _keys: list[Tensor]
    _values: list[Tensor]
    _capacity: int  # positions that every layer has memory for
    _wrapped: Any  # of `all_rooms_as`, as long as the memory stays the same

    def __init__(self, config: ModelConfig, limit: int, dtype: torch.dtype, device: torch.device) -> None:
        self.limit = limit
        self.length = 0
        nothing = torch.empty((config.num_kv_heads, 0, config.head_dim), dtype=dtype, device=device)
        self._put([nothing] * config.num_layers, [nothing] * config.num_layers)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts key and value [n, kv_heads, head_dim] behind what is held, and returns views of all that is used.

        The views are [kv_heads, length + n, head_dim]. `length` itself stays: `advance` moves it.
        Raises `TorchchatError` where `limit` would be passed.
        """
        end = self.length + key.shape[0]
        keys, values = self.room(layer, key.shape[0])
        keys[:, self.length : end] = key.transpose(0, 1)
        values[:, self.length : end] = value.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def room(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """All memory of one layer, [kv_heads, capacity, head_dim] twice, with room for `count` more positions.

        For operators that write to it themselves, behind `length`. Raises `TorchchatError` as `write` does.
        """
        if self.length + count > self._keys[layer].shape[1]:
            self._grow((layer,), self.length + count)
        return self._keys[layer], self._values[layer]

    def all_rooms(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """`room` of every layer: keys and values, layer by layer."""
        if self.length + count > self._capacity:
            self._grow(range(len(self._keys)), self.length + count)
        return self._keys, self._values

    def all_rooms_as(self, wrap: Callable[[list[Tensor], list[Tensor]], Any], count: int) -> Any:
        """`wrap` of `all_rooms`, which is called again when there is other memory, and not for every token."""
        if self._wrapped is None or self.length + count > self._capacity:
            keys, values = self.all_rooms(count)
            self._wrapped = wrap(keys, values)
        return self._wrapped

    def advance(self, count: int) -> None:
        """Counts the `count` positions last written to every layer as held."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` positions; their memory is kept for what comes next."""
        if not 0 <= length <= self.length:
            raise TorchchatError(f"cannot cut a sequence of {self.length} tokens to {length}")
        self.length = length

    def copy(self, length: int) -> KVCache:
        """A cache of its own with the first `length` positions, and memory for them alone until it grows.

        Raises `TorchchatError` where this one does not hold so many.
        """
        if not 0 <= length <= self.length:
            raise TorchchatError(f"cannot copy {length} tokens of a sequence of {self.length}")
        copied = copy.copy(self)
        copied.length = length
        copied._put(*([each[:, :length].clone() for each in memory] for memory in (self._keys, self._values)))
        return copied

    def move_to(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Moves what is held into memory that somebody else gives, one tensor [kv_heads, capacity, head_dim] a layer.

        What the memory held before is overwritten with zeros. Raises `TorchchatError` where it is too small.
        """
        if min(room.shape[1] for room in (*keys, *values)) < self.length:
            raise TorchchatError(f"a sequence of {self.length} tokens does not fit into memory for {keys[0].shape[1]}")
        for old, new in zip((*self._keys, *self._values), (*keys, *values), strict=True):
            new[:, : self.length] = old[:, : self.length]
            new[:, self.length :].zero_()
        self._put(list(keys), list(values))

    def release(self) -> None:
        """Gives the memory back and forgets everything."""
        self.length = 0
        nothing = self._keys[0][:, :0].clone()
        self._put([nothing] * len(self._keys), [nothing] * len(self._values))

    def bytes_held(self) -> int:
        """Memory that the cache has taken, in bytes."""
        return sum(x.numel() * x.element_size() for x in (*self._keys, *self._values))

    def _put(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Makes this its memory."""
        self._keys, self._values = keys, values
        self._capacity = min(each.shape[1] for each in (*keys, *values))
        self._wrapped = None

    def _grow(self, layers: Sequence[int], needed: int) -> None:
        """Gives each of the layers room for `needed` positions."""
        if needed > self.limit:
            raise TorchchatError(f"the sequence would have {needed} tokens; the limit is {self.limit}",
                                 "start a new conversation, or ask for a larger --max-seq-length")
        capacity = min(max(FIRST_CAPACITY, 1 << (needed - 1).bit_length()), self.limit)
        try:
            for layer in layers:  # one after the other: the old memory of each is free before the next one grows
                keys, values = self._grown(self._keys[layer], capacity), self._grown(self._values[layer], capacity)
                self._keys[layer], self._values[layer] = keys, values
        finally:
            self._put(self._keys, self._values)

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        if old.shape[1] >= capacity:
            return old
        new = old.new_empty((old.shape[0], capacity, old.shape[2]))
        if self.length > 0:
            new[:, : self.length] = old[:, : self.length]
        return new
