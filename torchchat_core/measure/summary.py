"""A comparison in words and numbers: the cells of its table, what was left out and why, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from torchchat_core import __version__
from torchchat_core.amounts import size_text
from torchchat_core.measure.chart import FRONT_SENTENCE
from torchchat_core.measure.comparing import Comparison, Refused, Row, shortened
from torchchat_core.measure.tables import WIDTH, conditions_text, fitting, rate_text, wrapped

COLUMNS = ("recipe", "bytes", "ratio", "decode t/s", "prefill t/s", "perplexity", "change", "mean KL", "top-1",
           "front", "runs on")
NAMES = ("recipe",)
NARROW: Sequence[Sequence[str]] = (("bytes", "ratio", "perplexity", "change", "mean KL", "top-1", "front"),
                                   ("decode t/s", "prefill t/s", "runs on"))
LEGEND = "change: of the perplexity; mean KL: divergence from the unquantised model, nats a token; top-1: positions " \
         "at which both find the same token likeliest"
MARK = "*"
NAME_WIDTH = 30
NOISY = 0.25  # share of the median


def method_lines(comparison: Comparison) -> Iterator[str]:
    """What was measured and how, and with what."""
    first, rates = comparison.reference, comparison.reference.rates
    yield f"{comparison.text.description}: {first.perplexity.tokens} tokens in windows of {comparison.window}"
    if comparison.text.note is not None:
        yield comparison.text.note
    if comparison.calibration is not None:
        yield f"recipes that look at a text were given {comparison.calibration.path.name}, up to " \
              f"{comparison.calibration.tokens} tokens of it"
    yield f"speed: a prompt of {rates.prompt_tokens} tokens and {rates.new_tokens} more, median of {rates.repeats} " \
          f"runs after one that warms up, with half of their range; {conditions_text()}"


def cells(row: Row, comparison: Comparison) -> list[tuple[str, float | str]]:
    """One row of the table: each of `COLUMNS` as people read it, and as it sorts."""
    whole, perplexity = comparison.reference, row.perplexity.perplexity
    share, change = row.bytes / whole.bytes, perplexity / whole.perplexity.perplexity - 1
    divergence, on_front = row.divergence, row in comparison.front
    return [
        (row.label, row.label),
        (size_text(row.bytes), row.bytes),
        (f"{100 * share:.0f} %", share),
        (rate_text(row.rates.decode), row.rates.decode.median),
        (rate_text(row.rates.prefill), row.rates.prefill.median),
        (f"{perplexity:#.4g}" if perplexity < 1000 else f"{perplexity:.0f}", perplexity),
        ("" if row is whole else f"{100 * change:+.2f} %", change),
        ("" if row is whole else f"{divergence.mean_kl:.5f}", divergence.mean_kl),
        ("" if row is whole else f"{100 * divergence.top_1:.1f} %", divergence.top_1),
        (MARK if on_front else "", float(on_front)),
        (f"{row.executor}, {row.device}, {row.dtype}",) * 2,
    ]


def table_lines(comparison: Comparison, width: int = WIDTH) -> Iterator[str]:
    """The whole report as text: a table, or two below each other where one is wider than `width`.

    What runs on the same executor, device and dtype in every row is said once.
    """
    rows = [[text for text, _ in cells(row, comparison)] for row in comparison.rows]
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    columns["recipe"] = tuple(shortened(name, NAME_WIDTH) for name in columns["recipe"])
    narrow = NARROW
    yield comparison.model
    for line in method_lines(comparison):
        yield from wrapped(line, width)
    if len(set(columns["runs on"])) == 1:
        yield f"all on {columns.pop('runs on')[0]}"
        narrow = (narrow[0], ("decode t/s", "prefill t/s"))
    yield from fitting(columns, NAMES, narrow, width)
    yield from wrapped(LEGEND, width)
    yield from wrapped(f"{MARK} {FRONT_SENTENCE}", width)
    yield from noise_lines(comparison)
    yield from (f"not measured: {line}" for line in refused_lines(comparison))
    yield from (f"left alone: {line}" for line in left_alone_lines(comparison))


def noise_lines(comparison: Comparison) -> Iterator[str]:
    """A warning where the repeats of one model differ so much that its speed says little."""
    noisy = [row for row in comparison.rows if max(row.rates.decode.spread, row.rates.prefill.spread) > NOISY]
    if noisy:
        yield f"the speeds of {len(noisy)} of {len(comparison.rows)} rows vary by more than {100 * NOISY:.0f} % " \
              "either way: measure again when the machine is quiet"


def refused_lines(comparison: Comparison) -> Iterator[str]:
    """One line for each candidate that could not be measured, with the reason and what may help."""
    for each in comparison.refused:
        yield f"{shortened(each.name)}: {each.reason}" + (f" (try: {each.fix})" if each.fix else "")


def left_alone_lines(comparison: Comparison) -> Iterator[str]:
    """For each recipe, the layers that it could have taken and did not: how many, their bytes, why."""
    for row in comparison.rows:
        if row.report is None:
            continue
        if not row.report.done:
            yield f"{shortened(row.label)}: all layers; the recipe quantises none of this model"
        by_reason = sorted(row.report.left, key=lambda layer: layer.reason or "")
        for reason, group in groupby(by_reason, key=lambda layer: layer.reason or ""):
            layers = list(group)
            size = size_text(sum(layer.bytes_after for layer in layers))
            named = layers[0].name if len(layers) == 1 else f"{len(layers)} layers, such as {layers[0].name}"
            yield f"{shortened(row.label)}: {named} ({size}): {reason}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure, unrounded; rates in tokens per second, divergences in nats."""
    content = len(comparison.text.content.encode())
    return {
        "model": comparison.model,
        "text": {"name": comparison.text.name, "characters": comparison.text.read,
                 "of_characters": comparison.text.whole, "bytes": content, "window": comparison.window,
                 "tokens": comparison.reference.perplexity.tokens},
        "calibration": {"text": comparison.calibration.path.name, "most_tokens": comparison.calibration.tokens}
        if comparison.calibration is not None else None,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "torchchat": __version__,
        "rows": [_row_json(row, comparison, content) for row in comparison.rows],
        "refused": [_refused_json(each) for each in comparison.refused],
    }


def _row_json(row: Row, comparison: Comparison, text_bytes: int) -> dict[str, Any]:
    left = [{"name": layer.name, "bytes": layer.bytes_after, "reason": layer.reason}
            for layer in row.report.left] if row.report else []
    rates = {kind: {"median": rate.median, "lowest": rate.lowest, "highest": rate.highest}
             for kind, rate in (("decode_tps", row.rates.decode), ("prefill_tps", row.rates.prefill))}
    return {
        "recipe": row.name, "executor": row.executor, "device": row.device, "dtype": row.dtype, "bytes": row.bytes,
        **rates, "prompt_tokens": row.rates.prompt_tokens, "new_tokens": row.rates.new_tokens,
        "repeats": row.rates.repeats, "mean_nll": row.perplexity.mean_nll, "perplexity": row.perplexity.perplexity,
        "bits_per_byte": row.perplexity.bits_per_byte(text_bytes), "mean_kl": row.divergence.mean_kl,
        "top_1": row.divergence.top_1, "on_front": row in comparison.front, "left_alone": left,
    }


def _refused_json(refused: Refused) -> dict[str, str | None]:
    return {"recipe": refused.name, "reason": refused.reason, "try": refused.fix}
