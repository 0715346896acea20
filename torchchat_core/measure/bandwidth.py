"""How fast this machine reads its memory: the limit of decoding, which reads every weight for every token."""

from __future__ import annotations

import time

import torch

SIZE = 512 << 20  # bytes, beyond what any cache of a processor holds
REPEATS = 5


def read_speed(size: int = SIZE, device: str = "cpu") -> float:
    """Bytes per second that are read from the device's memory: the best of several passes.

    On the CPU by all threads of PyTorch together.
    """
    numbers = torch.ones(size // 4, device=device)
    numbers.max().item()  # loads what a device has for it
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        numbers.max().item()  # as a number of Python's, so that a device has finished
        best = min(best, time.perf_counter() - started)
    return numbers.nbytes / best
