"""`torchchat remove`: deletes what torchchat downloaded, and nothing else."""

from __future__ import annotations

import sys

import click

from torchchat_core.amounts import bytes_text
from torchchat_core.cli.completion import complete_model
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import kept_copy, locate, products_of, source_of
from torchchat_core.sources.reference import resolve
from torchchat_core.specs import ModelRef, ModelSourceInfo


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(registry: Registry, /, model: str, yes: bool) -> None:
    """Delete the copy of a model that torchchat downloaded.

    Folders and files of your own are never deleted, and neither is what you made of the model.
    """
    ref = resolve(model, registry)
    info = source_of(ref, registry)
    if not info.keeps:
        raise TorchchatError(f"{model!r} is {_whose(ref)}; only what torchchat downloaded is removed",
                             "the downloaded ones: torchchat list --downloaded")
    found = _description(ref, info)
    if found is None and not yes:
        raise TorchchatError(f"{model!r} is not downloaded",
                             "with --yes, what a download that was cut off has left is deleted")
    if found is not None and not yes:
        _ask(f"Delete {found}?")
    freed = info.make().remove(ref)
    if not freed and found is None:
        raise TorchchatError(f"{model!r} is not downloaded", "what is here: torchchat list --downloaded")
    click.echo(f"removed {model}: {bytes_text(freed)} are free again")
    for made in products_of(ref):
        click.echo(f"what you made of it stays: {made.path}")


def _whose(ref: ModelRef) -> str:
    return "a folder or file of your own" if ref.scheme == "file" else "no copy that was downloaded"


def _description(ref: ModelRef, info: ModelSourceInfo) -> str | None:
    """What would be deleted, with its size; None where the model is not here, or not all of it."""
    files = locate(ref, info)
    if files is None:
        return None
    copy = kept_copy(files, list(info.make().kept()))
    return f"{copy.path} ({bytes_text(copy.bytes)})" if copy is not None else str(files.root)


def _ask(question: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise TorchchatError(f"nobody can be asked: {question}", "--yes deletes without asking")
    if not click.confirm(question, err=True):
        raise click.Abort
