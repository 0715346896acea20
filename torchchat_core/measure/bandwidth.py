"""How fast this machine reads its memory: the limit of decoding, which reads every weight for every token."""

from __future__ import annotations

import time

import torch

SIZE = 512 << 20  # bytes, beyond what any cache of a processor holds
REPEATS = 5


def read_speed(size: int = SIZE) -> float:
    """Bytes per second that all threads of PyTorch together read from the CPU's memory: the best of several passes."""
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        numbers.max()
        best = min(best, time.perf_counter() - started)
    return numbers.nbytes / best
