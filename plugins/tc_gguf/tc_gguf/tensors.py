"""Tensors of a GGUF file in memory: mapped where they are used as they are stored, unpacked in pieces where not."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from tc_gguf.file import DAMAGED, GgufTensor
from tc_gguf.quants import dequantizer
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError, quoted, quoted_path

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 1 << 20  # numbers that PyTorch unpacks at a time: what is in between stays in the processor's cache
KERNEL_PIECE = 1 << 23  # that a kernel does: its threads wait for each other at the end of each piece


class Mapping:
    """One file that is mapped once, whoever uses its tensors, or only the part that holds the tensor `part`.

    What is written to them never reaches the file.
    """

    def __init__(self, path: Path, part: GgufTensor | None = None) -> None:
        self._start = 0 if part is None else part.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = 0 if part is None else part.offset + part.size - self._start
        try:
            with path.open("rb") as file:
                if part is not None and os.fstat(file.fileno()).st_size < part.offset + part.size:
                    raise _cut_off(part)
                self._bytes = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=self._start)
        except (OSError, ValueError) as error:
            raise TorchchatError(f"cannot map {quoted_path(str(path))}: {error}") from None

    def tensor(self, stored: GgufTensor, dtype: torch.dtype) -> Tensor:
        """The bytes of a tensor as numbers of `dtype`, flat. Raises `TorchchatError` where the file was cut off."""
        offset = stored.offset - self._start
        if offset + stored.size > len(self._bytes):
            raise _cut_off(stored)
        return torch.frombuffer(self._bytes, dtype=dtype, count=stored.size // dtype.itemsize, offset=offset)


class Unpacker:
    """Unpacks tensors piece by piece through buffers of its own, which it keeps: neither the bytes of a tensor nor its
    float32 numbers are ever in memory as a whole. Not thread-safe.

    The commonest formats are unpacked by core's kernels where they are compiled, or where `size`, the bytes that are
    going to be unpacked, makes that worth while; the others, and otherwise all of them, by PyTorch.
    """

    def __init__(self, size: int = 0) -> None:
        self._with_kernels = kernels.available(building=size >= kernels.WORTH_BUILDING)
        self._bytes = bytearray()
        self._numbers = torch.empty(0)

    def unpack(self, stored: GgufTensor, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`: every number as float32 first, then rounded.

        Raises `TorchchatError` where the file cannot be read.
        """
        unpack, kind = dequantizer(stored.type.name), stored.type
        result = torch.empty(stored.shape, dtype=dtype)
        blocks = result.view(-1, kind.block_elements)
        by_kernel = self._with_kernels and kind.name in kernels.GGML_FORMATS
        step = min((KERNEL_PIECE if by_kernel else PIECE) // kind.block_elements, len(blocks))
        buffer, numbers = self._buffers(step * kind.block_bytes, 0 if by_kernel else step * kind.block_elements)
        packed = torch.frombuffer(buffer, dtype=torch.uint8).view(-1, kind.block_bytes)
        numbers = numbers.view(-1, kind.block_elements)
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset)
                for piece in blocks.split(step):
                    wanted = len(piece) * kind.block_bytes
                    if file.readinto(buffer[:wanted]) != wanted:
                        raise _cut_off(stored)
                    if by_kernel:
                        torch.ops.torchchat.unpack_ggml(packed[: len(piece)], kind.name, piece)
                    else:
                        piece.copy_(unpack(packed[: len(piece)], numbers[: len(piece)]))
        except OSError as error:
            raise TorchchatError(f"cannot read {quoted_path(str(stored.path))}: {error.strerror or error}") from None
        return result

    def _buffers(self, size: int, count: int) -> tuple[memoryview, Tensor]:
        """Room for so many bytes and numbers. Fresh memory for each tensor would be left as holes between them."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        if len(self._numbers) < count:
            self._numbers = torch.empty(count)
        return memoryview(self._bytes)[:size], self._numbers[:count]


def _cut_off(stored: GgufTensor) -> TorchchatError:
    return TorchchatError(f"{stored.path.name} became shorter while it was read: tensor {quoted(stored.name)}", DAMAGED)
