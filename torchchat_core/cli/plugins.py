"""`torchchat plugins`: what is installed, what it offers, and what goes with what."""

from __future__ import annotations

import json
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
        click.echo(json.dumps(matrix_rows(registry)) if as_json else matrix_table(registry), nl=as_json)
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
    """The matrix as a Markdown table: a row for executor, file format and scheme, a column for each device."""
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in matrix_rows(registry):
        key = (row["executor"], "in memory" if row["format"] == "module" else row["format"], row["scheme"] or "none")
        by_device = cells.setdefault(key, {})
        fitting = by_device.setdefault(row["device"], [])
        if row["refusal"] is None:
            fitting.append(row["dtype"])
    devices = sorted({device for by_device in cells.values() for device in by_device})
    lines = ["| executor | model | quantisation | " + " | ".join(devices) + " |",
             "|---|---|---|" + "---|" * len(devices)]
    for key, by_device in cells.items():
        if any(by_device.values()):
            columns = [", ".join(by_device[device]) or "-" for device in devices]
            lines.append("| " + " | ".join([*key, *columns]) + " |")
    return "\n".join(lines) + "\n"
