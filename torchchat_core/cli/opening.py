"""Opening a model for a verb: what has to be fetched or built first is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.amounts import size_text
from torchchat_core.cli.flags import model_request
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.plugins import Registry

if TYPE_CHECKING:
    from torchchat_core.pipeline import OpenedModel
    from torchchat_core.quantization.recipe import RecipeReport


@contextmanager
def opened_model(flags: Mapping[str, Any], registry: Registry) -> Iterator[OpenedModel]:
    """The model that the flags of `model_flags` ask for. Progress is shown until it is open, and not afterwards."""
    from torchchat_core.pipeline import open_model

    with ExitStack() as stack:
        with shown_progress():
            opened = stack.enter_context(open_model(model_request(flags), registry))
        if opened.quantisation is not None:
            for line in quantisation_lines(opened.quantisation):
                click.echo(line, err=True)
        for line in kept_lines(opened):
            click.echo(line, err=True)
        yield opened


def kept_lines(opened: OpenedModel) -> Iterator[str]:
    """Which layers --keep-quantized kept, and whether they can be run fast."""
    from torchchat_core import kernels

    if opened.kept is None:
        return
    yield opened.kept.line(opened.model.dtype)
    if opened.model.device == "cpu" and (missing := kernels.load(building=False)) is not None:
        yield f"notice: without the CPU kernels, layers with weights of so few bits are slow: {missing}"


def quantisation_lines(report: RecipeReport) -> Iterator[str]:
    """Yield a summary of what a recipe did, and a warning if it did not make the model smaller."""
    reasons = {layer.reason for layer in report.left}
    why = f" ({reasons.pop()})" if len(reasons) == 1 else ""
    left = f", left {len(report.left)} alone{why}" if report.left else ""
    count = f"{len(report.done)} layer{'' if len(report.done) == 1 else 's'}"
    yield f"quantised {count}{left}: {size_text(report.bytes_before)} -> {size_text(report.bytes_after)}"
    before = report.bytes_before if report.bytes_in_files is None else report.bytes_in_files
    if report.bytes_after >= before:
        why = "; ".join(dict.fromkeys(layer.reason for layer in report.left if layer.reason))
        yield f"warning: the recipe does not make the model smaller: {size_text(before)} in its files, " \
              f"{size_text(report.bytes_after)} with the recipe" + (f" ({why})" if why else "")
