"""`torchchat remove`: deletes downloaded copies from torchchat's cache and from the one that it shares with others."""

from __future__ import annotations

import sys
from typing import Any

import click

from torchchat_core.amounts import bytes_text
from torchchat_core.cli.completion import complete_model
from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import kept_copy, locate, products_of, source_of
from torchchat_core.sources.reference import resolve
from torchchat_core.specs import ModelRef, ModelSourceInfo, Removal


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(registry: Registry, /, model: str, yes: bool) -> None:
    """Delete the downloaded copy of a model.

    Models of a hub lie in the cache of Hugging Face's tools, and what those fetched of the model goes too. Folders and
    files of your own are never deleted, and neither is what you made of the model.
    """
    ref = resolve(model, registry)
    info = source_of(ref, registry)
    if not info.keeps:
        raise TorchchatError(f"{quoted_path(model)} is {_whose(ref)}; only what was downloaded is removed",
                             "the downloaded ones: torchchat list --downloaded")
    source: Any = info.make()
    found = _removal(ref, info, source)
    if found is None and not yes:
        raise TorchchatError(f"{quoted_path(model)} is not downloaded",
                             None if hasattr(source, "removal")
                             else "with --yes, what a download that was cut off has left is deleted")
    if found is not None and not yes:
        _ask(_question(found))
    freed = source.remove(ref)
    if not freed and found is None:
        raise TorchchatError(f"{quoted_path(model)} is not downloaded", "what is here: torchchat list --downloaded")
    click.echo(f"removed {model}: {bytes_text(freed)} are free again")
    if found is not None and len(found.models) > 1:
        click.echo(f"with it went {_listed(found)}")
    for made in products_of(ref):
        click.echo(f"what you made of it stays: {made.path}")


def _whose(ref: ModelRef) -> str:
    return "a folder or file of your own" if ref.scheme == "file" else "no copy that was downloaded"


def _removal(ref: ModelRef, info: ModelSourceInfo, source: Any) -> Removal | None:
    """What would be deleted; None where nothing is here, or where its source cannot tell."""
    if hasattr(source, "removal"):
        found: Removal | None = source.removal(ref)
        return found
    files = locate(ref, info)
    copy = kept_copy(files, list(source.kept())) if files is not None else None
    return Removal(path=copy.path, bytes=copy.bytes, models=(copy,)) if copy is not None else None


def _question(found: Removal) -> str:
    what = f"{found.path} ({bytes_text(found.bytes)})"
    if not found.models:
        return f"Delete what a download that was cut off has left, {what}?"
    return f"Delete {what}, which holds {_listed(found)}?" if len(found.models) > 1 else f"Delete {what}?"


def _listed(found: Removal) -> str:
    names = [model.reference for model in found.models]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _ask(question: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise TorchchatError(f"nobody can be asked: {question}", "--yes deletes without asking")
    if not click.confirm(question, err=True):
        raise click.Abort
