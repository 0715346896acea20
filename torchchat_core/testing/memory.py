"""How much memory is held, measured so that what was closed and not freed shows."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchchat_core.testing.demands import demand

ROUNDS = 6


def demand_no_growth(use: Callable[[], None], device: str, taken: int, what: str) -> None:
    """Demands that using and closing `what`, which takes so many bytes, again and again needs no further memory."""
    for _ in range(2):  # what is made once for all of them
        use()
    before = bytes_held(device)
    for _ in range(ROUNDS):
        use()
    growth = max(after - first for first, after in zip(before, bytes_held(device), strict=True))
    demand(growth < ROUNDS * taken / 2, f"{what} of {taken / 1e6:.1f} MB was used and closed {ROUNDS} times, and "
           f"{growth / 1e6:.1f} MB stay", "drop every reference to tensors and native objects in close()")


def bytes_held(device: str) -> list[int]:
    """Bytes by each way in which they can be counted: growth of any of them is memory that was not given back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return [torch.cuda.memory_allocated()]
    if device == "mps":
        return [torch.mps.current_allocated_memory()]
    return [_bytes_of_tensors(), _resident_bytes()]


def _bytes_of_tensors() -> int:
    """Of all tensors that Python knows of, each storage once: exact, but blind for what C++ alone holds."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor) and not found.is_meta]
    real = [tensor for tensor in tensors if not hasattr(tensor, "fake_mode")]  # compilers leave some without memory
    return sum(dict(filter(None, map(_place_and_bytes, real))).values())


def _place_and_bytes(tensor: Tensor) -> tuple[int, int] | None:
    """Where its storage is and how large; None for wrappers, whose inner tensors are found by themselves."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return None


def _resident_bytes() -> int:
    """Memory of the process, in bytes; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what is freed between other blocks
    if give_back is not None:
        give_back(0)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
