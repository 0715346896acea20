"""Bytes of a file that are made when they are written, so that an export never holds its weights twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from executorch.exir._serialize._cord import Cord
from torch import Tensor

ALIGNMENT = 64  # of constants in the file: what the widest vector instructions like


class Constant(Cord):  # type: ignore[misc]
    """One constant as ExecuTorch's serialiser takes it: a length, and pieces that are written later.

    `make` gives the tensor, contiguous and on the CPU, as often as it is asked for; `size` is that of its bytes.
    """

    def __init__(self, make: Callable[[], Tensor], size: int) -> None:
        super().__init__()
        self.make = make
        self._buffers = [self]
        self._byte_size = size

    def __deepcopy__(self, memo: dict[int, Any]) -> Constant:
        return self

    def content(self) -> memoryview:
        """The bytes, in the memory of the tensor where it has them already."""
        numbers: Any = self.make().detach().contiguous().view(-1).view(torch.uint8).numpy()
        return memoryview(numbers)

    def digest(self) -> str:
        """sha256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.content()).hexdigest()


def constant(make: Callable[[], Tensor]) -> Constant:
    """Of a tensor that is cheap to make again."""
    return Constant(make, make().nbytes)
