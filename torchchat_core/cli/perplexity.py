"""`torchchat perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.amounts import seconds_text
from torchchat_core.cli.flags import model_flags
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.opening import opened_model
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.texts import text_flags, text_of
from torchchat_core.cli.values import Number
from torchchat_core.plugins import Registry

if TYPE_CHECKING:
    from torchchat_core.measure.perplexity import TextPerplexity

CHARACTERS = 8000


@click.command(cls=SectionedCommand)
@model_flags
@text_flags(CHARACTERS)
@click.option("--stride", type=Number(minimum=1), metavar="N",
              help="Tokens between the beginnings of windows, which overlap where it is less than a window: every "
                   "token then has more context, and it takes longer [default: no overlap].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def perplexity(registry: Registry, /, **flags: Any) -> None:
    """Measure how well MODEL predicts a text: mean negative log-likelihood, perplexity, bits per byte.

    Perplexity compares models of one tokenizer; bits per byte compares any. Nothing has to be downloaded for it.
    """
    from torchchat_core.measure.perplexity import measure_text

    text = text_of(flags, CHARACTERS)
    with opened_model(flags, registry) as opened, shown_progress():
        found = measure_text(opened, text, flags["window"], flags["stride"])
        runs_on = {"model": opened.name, "executor": opened.executor.name, "device": opened.model.device,
                   "dtype": opened.model.dtype}
    if flags["as_json"]:
        click.echo(json.dumps({**runs_on, **_json(found)}))
        return
    click.echo(", ".join(runs_on.values()))
    overlap = "" if found.stride == found.window - 1 else f", every {found.stride}"
    click.echo(f"{text.description}: {found.figures.tokens} tokens in windows of {found.window}{overlap}, "
               f"{seconds_text(found.seconds)}")
    if text.note is not None:
        click.echo(text.note)
    click.echo(f"mean NLL       {found.figures.mean_nll:.5f} nats a token")
    click.echo(f"perplexity     {found.figures.perplexity:#.6g}")
    click.echo(f"bits per byte  {found.bits_per_byte:.4f}")


def _json(found: TextPerplexity) -> dict[str, Any]:
    text = found.text
    return {"text": {"name": text.name, "characters": text.read, "of_characters": text.whole,
                     "bytes": len(text.content.encode())},
            "window": found.window, "stride": found.stride, "tokens": found.figures.tokens,
            "mean_nll": found.figures.mean_nll, "perplexity": found.figures.perplexity,
            "bits_per_byte": found.bits_per_byte, "seconds": found.seconds}
