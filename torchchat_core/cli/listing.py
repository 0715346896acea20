"""`torchchat list`: the models that have a name, the ones that are here, and what was made of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from torchchat_core.amounts import bytes_text
from torchchat_core.memory import machine_memory
from torchchat_core.models.catalogue import STARTING_MODEL
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import ListedModel, take_inventory
from torchchat_core.specs import QuantizerInfo

HEADINGS = ("NAME", "SIZE", "FITS", "LICENSE", "HERE")
LONGEST_NAME = 28  # longer ones stand on a line of their own
GAP = "  "
RUNNING_BYTES = 600_000_000  # memory in addition to the weights, with the KV cache of a short conversation
LOADING_PEAK = 1.1  # peak memory while loading, relative to the weights
INT4_SIZE = 0.35  # size of a model quantized to linear:int4, embeddings included, relative to 16-bit weights


@click.command("list")
@click.option("--downloaded", is_flag=True, help="Only the models that are on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_models(registry: Registry, /, downloaded: bool, as_json: bool) -> None:
    """List local models, the files made from them, and the models that can be downloaded by name.

    SIZE is the approximate size of the download. FITS says whether the model fits in the memory of this machine: yes,
    no, or int4 if it fits with --quantize linear:int4. HERE is the size of the local copy.
    """
    inventory = take_inventory(registry)
    for warning in inventory.warnings:
        click.echo(f"warning: {warning}", err=True)
    models = [model for model in in_order(inventory.models) if not downloaded or model.path is not None]
    memory = machine_memory()[0]
    quantizes = any(info.scheme == "linear:int4" for info in registry.infos(QuantizerInfo))
    fits = [fit_in_memory(model, memory, quantizes) for model in models]
    if as_json:
        click.echo(json.dumps([_as_json(model, how) for model, how in zip(models, fits, strict=True)]))
        return
    click.echo("\n".join(table(models, fits, _width())))
    if sys.stdout is not None and sys.stdout.isatty():
        for line in _notes(fits, memory):
            click.echo(line, err=True)


def in_order(models: Iterable[ListedModel]) -> list[ListedModel]:
    """Return local models first, then the starting model, then the others in their original order."""
    return sorted(models, key=lambda model: (model.path is None, model.name != STARTING_MODEL))


def fit_in_memory(model: ListedModel, memory: int, quantizes: bool) -> str | None:
    """Return "yes", "no", or "int4" if the model fits only when quantized; None if a size is unknown.

    `memory` is that of the machine in bytes; `quantizes` is True if linear:int4 is installed.
    """
    size = model.bytes or model.bytes_here or (_stored_bytes(model.path) if model.path is not None else None)
    if not size or not memory:
        return None
    if size * LOADING_PEAK + RUNNING_BYTES <= memory:
        return "yes"
    return "int4" if quantizes and size * INT4_SIZE * LOADING_PEAK + RUNNING_BYTES <= memory else "no"


def _stored_bytes(path: Path) -> int:
    """Return the size of a model's file, or of the files in its folder."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else (path,)) if file.is_file())
    except OSError:
        return 0


def _notes(fits: Sequence[str | None], memory: int) -> Iterator[str]:
    """Yield notes for a user at a terminal; scripts get only the table."""
    quantized = "; int4: with --quantize linear:int4" if "int4" in fits else ""
    yield f"FITS: in the {bytes_text(memory)} of memory of this machine{quantized}."
    yield f"To start with a small model that needs no permission: torchchat chat {STARTING_MODEL}"


def _as_json(model: ListedModel, fits: str | None) -> dict[str, Any]:
    return {**asdict(model), "path": str(model.path) if model.path else None, "downloaded": model.path is not None,
            "fits": fits, "start": model.name == STARTING_MODEL,
            "products": [{"kind": made.kind, "path": made.path, "detail": made.detail} for made in model.products]}


def _width() -> int | None:
    """Columns of the terminal; None where there is none, and nothing has to be shortened."""
    if os.environ.get("COLUMNS") or (sys.stdout is not None and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None


def table(models: Sequence[ListedModel], fits: Sequence[str | None], width: int | None) -> Iterator[str]:
    """Yield a heading, and for each model its row and the files made from it.

    If the table is wider than `width`, the license is shortened, then left out. Names and paths are never cut, so that
    users can copy them.
    """
    rows = [HEADINGS, *(_row(model, how or "-") for model, how in zip(models, fits, strict=True))]
    name, size, fit, licence, here = (max(len(row[column]) for row in rows if column or len(row[0]) <= LONGEST_NAME)
                                 for column in range(len(HEADINGS)))
    if width is not None:
        licence = min(licence, width - name - size - fit - here - 4 * len(GAP))
    for row, model in zip(rows, [None, *models], strict=True):
        columns = [f"{row[1]:>{size}}", row[2].ljust(fit),
                   *([_cut(row[3], licence)] if licence >= len(HEADINGS[3]) else []), row[4]]
        if len(row[0]) > LONGEST_NAME:
            yield row[0]
        yield GAP.join([(row[0] if len(row[0]) <= LONGEST_NAME else "").ljust(name), *columns]).rstrip()
        yield from (f"{GAP}{made.kind}{GAP}{made.path}{GAP}{made.detail}".rstrip()
                    for made in (model.products if model is not None else ()))


def _row(model: ListedModel, fits: str) -> tuple[str, str, str, str, str]:
    missing = "- (start)" if model.name == STARTING_MODEL else "-"
    here = missing if model.path is None else "yes" if model.bytes_here is None else bytes_text(model.bytes_here)
    licence = ", ".join(part for part in (model.licence, "gated" if model.gated else "") if part)
    return model.name, bytes_text(model.bytes) if model.bytes is not None else "-", fits, licence or "-", here


def _cut(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[:width - 1] + "…"
