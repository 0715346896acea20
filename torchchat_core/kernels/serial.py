"""Run PyTorch's operations on one thread if the kernels are not built and the model is small."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from torchchat_core.kernels.build import openmp_of_torch

SMALL_BYTES = 8 << 20  # weights whose operations take no longer than synchronizing threads on a busy machine


def is_small(module: nn.Module) -> bool:
    """Return True if a second thread may cost more than it gains for the operations of `module`."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) <= SMALL_BYTES


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's CPU operations only on the calling thread in the block. Other calling threads are not affected.

    Does nothing if PyTorch's OpenMP library is not found.
    """
    openmp, mkl = _openmp(), _mkl()
    if openmp is None:
        yield
        return
    before = torch.get_num_threads()  # also makes PyTorch initialize this thread's number
    openmp.omp_set_num_threads(1)
    mkl_before = mkl.MKL_Set_Num_Threads_Local(1) if mkl is not None else 0
    try:
        yield
    finally:
        if mkl is not None:
            mkl.MKL_Set_Num_Threads_Local(mkl_before)
        openmp.omp_set_num_threads(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    found = openmp_of_torch()
    return ctypes.CDLL(found[0]) if found else None


@cache
def _mkl() -> ctypes.CDLL | None:
    found = sorted(Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"))
    library = ctypes.CDLL(str(found[0])) if found else None
    return library if hasattr(library, "MKL_Set_Num_Threads_Local") else None
