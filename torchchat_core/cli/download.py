"""`torchchat download`: fetches models, and says where they are."""

from __future__ import annotations

import dataclasses

import click

from torchchat_core.cli.completion import complete_model
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import kept_at, locate, source_of
from torchchat_core.sources.reference import resolve
from torchchat_core.specs import ModelFiles, ModelRef, ModelSourceInfo


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_model)
@click.option("--hf-token", metavar="TOKEN", help="An access token of the Hugging Face hub, for gated models [default: "
                                                  "HF_TOKEN, or the stored login].")
@click.pass_obj
def download(registry: Registry, /, models: tuple[str, ...], hf_token: str | None) -> None:
    """Download models, and print where they are.

    MODEL is a name of 'torchchat list', owner/name of a hub, or a URL. What is here already is not fetched again; a
    download that was cut off goes on where it was.
    """
    references = [dataclasses.replace(resolve(model, registry), token=hf_token) for model in models]
    sources = [source_of(ref, registry) for ref in references]  # what is misspelt is told before anything is fetched
    for ref, info in zip(references, sources, strict=True):
        files = locate(ref, info)
        if files is not None:
            click.echo(f"{ref.text} is already here", err=True)
        else:
            files = _fetch(ref, info)
        click.echo(kept_at(files))


def _fetch(ref: ModelRef, info: ModelSourceInfo) -> ModelFiles:
    with shown_progress():
        files: ModelFiles = info.make().fetch(ref)
    return files
