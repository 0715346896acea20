"""`torchchat plugins`: what is installed, what it offers, and what goes with what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click

from torchchat_core.plugins import Plugin, Registry
from torchchat_core.support import all_combinations, refusal


@click.command()
@click.option("--matrix", is_flag=True, help="Which executor, scheme, device, dtype and export format go together.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plugins(registry: Registry, /, matrix: bool, as_json: bool) -> None:
    """List the plugins: version, state, what each offers, and why one failed."""
    if matrix:
        for line in [json.dumps(matrix_rows(registry))] if as_json else matrix_lines(registry):
            click.echo(line)
        return
    if as_json:
        click.echo(json.dumps([_as_json(plugin) for plugin in registry.plugins]))
        return
    for plugin in registry.plugins:
        state = "" if plugin.state == "loaded" else f"  [{plugin.state}]"
        click.echo(f"{plugin.qualified_name} {plugin.version}{state}")
        if plugin.reason:
            click.echo(f"    {plugin.reason}")
        for info in plugin.offers:
            click.echo(f"    {info.kind:<13} {info.name:<14} {info.summary}")


def _as_json(plugin: Plugin) -> dict[str, Any]:
    return {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version,
            "state": plugin.state, "reason": plugin.reason,
            "offers": [{"kind": info.kind, "name": info.name, "summary": info.summary} for info in plugin.offers]}


def matrix_rows(registry: Registry) -> list[dict[str, Any]]:
    """Every combination of what is installed, with the reason where it does not work."""
    return [{**vars(each), "refusal": refusal(each, registry)} for each in all_combinations(registry)]


def matrix_table(registry: Registry) -> str:
    """Return the matrix as a Markdown table."""
    headings, *rows = _matrix(registry)
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("|" + "|".join(line) + "|\n" if line[0] == "---" else "| " + " | ".join(line) + " |\n"
                   for line in lines)


def matrix_lines(registry: Registry) -> Iterator[str]:
    """Yield the matrix as a table with aligned columns; values that repeat from row to row are printed once."""
    headings, *rows = _matrix(registry)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    before: Sequence[str] = ()
    for row in [headings, *rows]:
        repeated = next((index for index, text in enumerate(row[:2]) if before[index:index + 1] != [text]), 2)
        shown = ["" if index < repeated else text for index, text in enumerate(row)]
        yield "  ".join(text.ljust(width) for text, width in zip(shown, widths, strict=True)).rstrip()
        before = row


def _matrix(registry: Registry) -> list[list[str]]:
    """Return headings and rows: one row for each executor, file format and scheme, one column for each device."""
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in matrix_rows(registry):
        key = (row["executor"], "in memory" if row["format"] == "module" else row["format"], row["scheme"] or "none")
        by_device = cells.setdefault(key, {})
        fitting = by_device.setdefault(row["device"], [])
        if row["refusal"] is None:
            fitting.append(row["dtype"])
    devices = sorted({device for by_device in cells.values() for device in by_device})
    rows = [[*key, *(", ".join(by_device[device]) or "-" for device in devices)]
            for key, by_device in cells.items() if any(by_device.values())]
    return [["executor", "model", "quantization", *devices], *rows]
