"""Figures as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from torchchat_core import __version__
from torchchat_core.measure.rates import Rate


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Rows as lines whose columns stand below each other: the first `left` at their left edges, the others at their
    right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) if place < left else text.rjust(width)
                        for place, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()


def rate_text(rate: Rate) -> str:
    """Tokens per second with half of the range of the repeats: "126 \u00b14 %"."""
    spread = f"\u00b1{100 * rate.spread:.0f} %" if rate.spread < 1 else ">\u00b1100 %"
    return f"{rate.median:.{0 if rate.median >= 100 else 1 if rate.median >= 10 else 2}f} {spread}"


def conditions_text() -> str:
    """What a speed depends on besides the model: threads and versions."""
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}, torch {torch.__version__}, torchchat {__version__}"
