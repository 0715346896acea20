"""Tensors of a GGUF file in memory: mapped where they are used as they are stored, unpacked in pieces where not."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import torch
from torch import Tensor

from tc_gguf.file import DAMAGED, GgufTensor
from tc_gguf.quants import dequantizer
from torchchat_core.errors import TorchchatError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 1 << 20  # numbers that are unpacked at a time, and stay in the processor's cache meanwhile
HUGE_PAGE = 2 << 20


class Mapping:
    """One file that is mapped once, whoever uses its tensors. What is written to them never reaches the file."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise TorchchatError(f"cannot map {str(path)!r}: {error}") from None

    def tensor(self, stored: GgufTensor, dtype: torch.dtype) -> Tensor:
        """The bytes of a tensor as numbers of `dtype`, flat. Raises `TorchchatError` where the file was cut off."""
        if stored.offset + stored.size > len(self._bytes):
            raise _cut_off(stored)
        return torch.frombuffer(self._bytes, dtype=dtype, count=stored.size // dtype.itemsize, offset=stored.offset)


def unpacked(stored: GgufTensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`: every number as float32 first, then rounded.

    It is read piece by piece through one small buffer, so that neither its bytes nor its float32 numbers are ever in
    memory as a whole. Raises `TorchchatError` where the file cannot be read.
    """
    unpack, kind = dequantizer(stored.type.name), stored.type
    result = _uninitialised(stored.shape, dtype)
    blocks = result.view(-1, kind.block_elements)
    step = PIECE // kind.block_elements
    buffer = bytearray(min(step, len(blocks)) * kind.block_bytes)
    packed = torch.frombuffer(buffer, dtype=torch.uint8).view(-1, kind.block_bytes)
    numbers = torch.empty(len(packed), kind.block_elements)
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            for piece in blocks.split(step):
                if file.readinto(memoryview(buffer)[: len(piece) * kind.block_bytes]) != len(piece) * kind.block_bytes:
                    raise _cut_off(stored)
                piece.copy_(unpack(packed[: len(piece)], numbers[: len(piece)]))
    except OSError as error:
        raise TorchchatError(f"cannot read {str(stored.path)!r}: {error.strerror or error}") from None
    return result


def _cut_off(stored: GgufTensor) -> TorchchatError:
    return TorchchatError(f"{stored.path.name} became shorter while it was read: tensor {stored.name!r:.100}", DAMAGED)


def _uninitialised(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor: in huge pages where Linux has them, as half of the time would go into small ones."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
