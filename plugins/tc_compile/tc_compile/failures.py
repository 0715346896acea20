"""What a compiler says when it fails, for one line."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """The reason in short: PyTorch's compiler puts many lines, and its own advice, behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[1:2] if lines and lines[0].endswith("raised:") else lines[:1]  # "backend='inductor' raised:"
    return f"{next(iter(told), type(error).__name__):.200}"
