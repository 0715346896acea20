"""Figures as lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import torch

from torchchat_core import __version__
from torchchat_core.measure.rates import Rate

WIDTH = 80  # characters, where nothing is known of a terminal


def wrapped(line: str, width: int) -> list[str]:
    """A sentence on as many lines as it needs."""
    return textwrap.wrap(line, max(width, WIDTH // 2))


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Rows as lines whose columns stand below each other: the first `left` at their left edges, the others at their
    right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) if place < left else text.rjust(width)
                        for place, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()


def fitting(columns: Mapping[str, Sequence[str]], names: Sequence[str], narrow: Sequence[Sequence[str]], width: int
            ) -> Iterator[str]:
    """Columns by their headings as a table, or as several below each other where it is wider than `width`: with the
    `names`, which stand at the left, the columns of each group of `narrow`."""
    def table(headings: Sequence[str]) -> list[str]:
        rows = zip(*(columns[heading] for heading in headings), strict=True)
        return list(aligned([headings, *rows], left=len(names)))

    whole = table([*names, *(heading for heading in columns if heading not in names)])
    fits = max(map(len, whole)) <= width
    for lines in [whole] if fits else [table([*names, *group]) for group in narrow]:
        yield ""
        yield from lines
    yield ""


def rate_text(rate: Rate) -> str:
    """Tokens per second with half of the range of the repeats: "126 \u00b14 %"."""
    spread = f"\u00b1{100 * rate.spread:.0f} %" if rate.spread < 1 else ">\u00b1100 %"
    return f"{rate.median:.{0 if rate.median >= 100 else 1 if rate.median >= 10 else 2}f} {spread}"


def conditions_text() -> str:
    """What a speed depends on besides the model: threads and versions."""
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}, torch {torch.__version__}, torchchat {__version__}"
