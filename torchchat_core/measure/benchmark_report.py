"""The rows of `torchchat bench` as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torchchat_core import __version__
from torchchat_core.amounts import size_text
from torchchat_core.measure.benchmark import Failed, Row
from torchchat_core.measure.comparing import shortened
from torchchat_core.measure.tables import WIDTH, conditions_text, fitting, rate_text, wrapped

COLUMNS = ("executor", "recipe", "runs on", "decode t/s", "prefill t/s", "TTFT", "load", "compile", "memory",
           "per token", "reads", "share")
NAMES = COLUMNS[:3]
NARROW = (("decode t/s", "prefill t/s", "TTFT", "reads", "share"), ("load", "compile", "memory", "per token"))
NAME_WIDTH = 30
LEGEND = "per token: weights read per token; reads: that times the decoding speed; share: of the memory bandwidth, " \
         "or \"in cache\" if the weights are read faster than that"


def table_lines(model: str, rows: Sequence[Row], failed: Sequence[Failed], width: int = WIDTH) -> Iterator[str]:
    """The whole report as text: a table, or two below each other where one is wider than `width`."""
    yield model
    if rows:
        yield from wrapped(method_line(rows[0]), width)
        yield from _tables(rows, width)
        yield from wrapped(LEGEND, width)
    if rows and failed:
        yield ""
    yield from (f"not measured: {line}" for line in failed_lines(failed))


def _tables(rows: Sequence[Row], width: int) -> Iterator[str]:
    columns = dict(zip(COLUMNS, zip(*([text for text, _ in cells(row)] for row in rows), strict=True), strict=True))
    names = [name for name in NAMES if name == "executor" or len(set(columns[name])) > 1 or len(rows) == 1]
    if "runs on" not in names:  # said once
        yield f"all on {columns['runs on'][0]}"
    if "recipe" not in names and columns["recipe"][0] != "-":
        yield f"all with {columns['recipe'][0]}"
    for name in set(NAMES) - set(names):
        del columns[name]
    yield from fitting(columns, names, NARROW, width)


def method_line(row: Row) -> str:
    """What was measured and how."""
    rates = row.rates
    return f"a prompt of {rates.prompt_tokens} tokens and {rates.new_tokens} more, median of {rates.repeats} runs " \
           f"after one that warms up, with half of their range; {conditions_text()}"


def cells(row: Row) -> list[tuple[str, float | str]]:
    """One row: each of `COLUMNS` as people read it, and as it sorts."""
    memory = row.peak_rss_bytes if row.peak_device_bytes is None else row.peak_device_bytes
    first = row.rates.first_token.median
    share = "unknown" if row.share is None else "in cache" if row.share > 1 else f"{100 * row.share:.0f} %"
    return [
        (row.executor, row.executor),
        (shortened(row.label or "-", NAME_WIDTH), row.label or ""),
        (f"{row.device}, {row.dtype}",) * 2,
        (rate_text(row.rates.decode), row.rates.decode.median),
        (rate_text(row.rates.prefill), row.rates.prefill.median),
        (_seconds(first), first),
        (_seconds(row.load_s), row.load_s),
        (_seconds(row.compile_s), row.compile_s),
        (size_text(memory), memory),
        (size_text(row.token_bytes), row.token_bytes),
        (f"{row.bandwidth / 1e9:.3g} GB/s", row.bandwidth),
        (share, row.share or 0.0),
    ]


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def failed_lines(failed: Sequence[Failed]) -> Iterator[str]:
    """One line for each way that could not be measured, with the reason and what may help."""
    for each in failed:
        recipe = f" with {shortened(each.recipe)}" if each.recipe else ""
        yield f"{each.executor}{recipe}: {each.reason}" + (f" (try: {each.fix})" if each.fix else "")


def as_json(model: str, rows: Sequence[Row], failed: Sequence[Failed]) -> dict[str, Any]:
    """Every figure, unrounded: seconds, bytes, tokens per second, bytes per second."""
    return {"model": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "torchchat": __version__,
            "rows": [_row_json(row) for row in rows], "failed": [dataclasses.asdict(each) for each in failed]}


def _row_json(row: Row) -> dict[str, Any]:
    plain = dataclasses.asdict(row)
    rates = plain.pop("rates")
    named = {"decode_tps": rates.pop("decode"), "prefill_tps": rates.pop("prefill"), "ttft_s": rates.pop("first_token")}
    return {**plain, **named, **rates, "bandwidth": row.bandwidth, "share": row.share}


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each row under the names of `as_json`, those of nested figures joined by underscores."""
    flat = [dict(_flat(_row_json(row))) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    content = io.StringIO()
    writer = csv.DictWriter(content, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return content.getvalue()


def _flat(row: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}_")
        else:
            yield f"{before}{name}", " ".join(value) if isinstance(value, tuple) else value
