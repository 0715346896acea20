"""PyTorch's operations on one thread, where the kernels are not built and a model is small."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from torchchat_core.kernels.build import openmp_of_torch

SMALL_BYTES = 8 << 20  # of weights: an operation on them takes no longer than a busy machine's threads take to meet


def is_small(module: nn.Module) -> bool:
    """Return True if a second thread gains less for the operations of `module` than it may cost."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) <= SMALL_BYTES


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's CPU operations on the calling thread alone; other threads of the process keep their number.

    Does nothing where the OpenMP library of PyTorch is not found.
    """
    openmp, mkl = _openmp(), _mkl()
    if openmp is None:
        yield
        return
    before = torch.get_num_threads()  # which also lets PyTorch initialize the number of this thread
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
