"""`torchchat where`: the path of a model that is on this machine, for scripts."""

from __future__ import annotations

import json
import shlex

import click

from torchchat_core.artifacts import exported_file, open_artifact
from torchchat_core.cli.completion import complete_model
from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.plugins import Registry
from torchchat_core.products import reference_of
from torchchat_core.sources.inventory import kept_at, locate, source_of
from torchchat_core.sources.reference import resolve


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: path, format, weights, revision; "
                                                      "of an exported file its manifest too.")
@click.pass_obj
def where(registry: Registry, /, model: str, as_json: bool) -> None:
    """Print the folder or file of a model on this machine.

    Touches no network; exit status 1 where the model is not here, or not all of it.
    """
    ref = resolve(model, registry)
    files = locate(ref, source_of(ref, registry))
    if files is None:
        raise TorchchatError(f"{quoted_path(model)} is not on this machine, or not all of it",
                             f"torchchat download {shlex.quote(model)}")
    path = kept_at(files)
    if not as_json:
        click.echo(path)
        return
    found = {"model": model, "reference": reference_of(ref), "path": str(path), "format": files.format,
             "weights": [str(file) for file in files.weights], "revision": files.revision}
    exported = exported_file(files)
    click.echo(json.dumps({**found, "manifest": open_artifact(exported).content} if exported else found,
                          ensure_ascii=False))
