"""`torchchat list`: the models that have a name, the ones that are here, and what was made of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import click

from torchchat_core.amounts import bytes_text
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import ListedModel, take_inventory

HEADINGS = ("NAME", "SIZE", "LICENCE", "HERE")
LONGEST_NAME = 28  # longer ones stand on a line of their own
GAP = "  "


@click.command("list")
@click.option("--downloaded", is_flag=True, help="Only the models that are on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_models(registry: Registry, /, downloaded: bool, as_json: bool) -> None:
    """List the models that are known by name, which of them are here, and what was made of them.

    SIZE is what a download takes, about; HERE is what is on this machine.
    """
    inventory = take_inventory(registry)
    for warning in inventory.warnings:
        click.echo(f"warning: {warning}", err=True)
    models = [model for model in inventory.models if not downloaded or model.path is not None]
    if as_json:
        click.echo(json.dumps([_as_json(model) for model in models]))
    else:
        click.echo("\n".join(table(models, _width())))


def _as_json(model: ListedModel) -> dict[str, Any]:
    return {**asdict(model), "path": str(model.path) if model.path else None, "downloaded": model.path is not None,
            "products": [{"kind": made.kind, "path": made.path, "detail": made.detail} for made in model.products]}


def _width() -> int | None:
    """Columns of the terminal; None where there is none, and nothing has to be shortened."""
    if os.environ.get("COLUMNS") or (sys.stdout is not None and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None


def table(models: Sequence[ListedModel], width: int | None) -> Iterator[str]:
    """The lines: a heading, and for each model its row and what was made of it.

    Where `width` columns are too few, the licence gives way: first its end, then all of it. Names and paths are
    never cut, since they are there to be copied.
    """
    rows = [HEADINGS, *(_row(model) for model in models)]
    name, size, licence, here = (max(len(row[column]) for row in rows if column or len(row[0]) <= LONGEST_NAME)
                                 for column in range(len(HEADINGS)))
    if width is not None:
        licence = min(licence, width - name - size - here - 3 * len(GAP))
    for row, model in zip(rows, [None, *models], strict=True):
        columns = [f"{row[1]:>{size}}", *([_cut(row[2], licence)] if licence >= len(HEADINGS[2]) else []), row[3]]
        if len(row[0]) > LONGEST_NAME:
            yield row[0]
        yield GAP.join([(row[0] if len(row[0]) <= LONGEST_NAME else "").ljust(name), *columns]).rstrip()
        yield from (f"{GAP}{made.kind}{GAP}{made.path}{GAP}{made.detail}".rstrip()
                    for made in (model.products if model is not None else ()))


def _row(model: ListedModel) -> tuple[str, str, str, str]:
    here = "-" if model.path is None else "yes" if model.bytes_here is None else bytes_text(model.bytes_here)
    licence = ", ".join(part for part in (model.licence, "gated" if model.gated else "") if part)
    return model.name, bytes_text(model.bytes) if model.bytes is not None else "-", licence or "-", here


def _cut(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[:width - 1] + "…"
