"""`torchchat bench`: speed and memory of one or every way to run a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import model_flags, model_request
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.setting_values import with_origin
from torchchat_core.cli.values import Number
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.progress import task
from torchchat_core.small_files import write_whole

if TYPE_CHECKING:
    from torchchat_core.measure.benchmark import Failed, Row, Way


@click.command(cls=SectionedCommand)
@model_flags
@click.option("--prompt-tokens", type=Number(minimum=1), default=128, show_default=True, metavar="N",
              help="Length of the prompt.")
@click.option("--new-tokens", type=Number(minimum=1), default=64, show_default=True, metavar="N",
              help="Tokens that are decoded after it.")
@click.option("--repeat", type=Number(minimum=1), default=5, show_default=True, metavar="N",
              help="Runs that count, after one that warms up.")
@click.option("--save", is_flag=True, help="Remember the fastest executor for this model on this machine, for each "
                                           "recipe that was measured: --executor auto then takes it.")
@click.option("--plot", multiple=True, metavar="FILE", help="Draw the rates: FILE.png, or FILE.html, a page that needs "
                                                            "nothing else; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@click.pass_obj
def bench(registry: Registry, /, **flags: Any) -> int:
    """Measure how fast MODEL decodes, reads a prompt and loads, and the memory that it needs.

    --executor all and --quantize all measure everything that is installed, each in a process of its own. Status 1 where
    nothing could be measured, or what was asked for by name.
    """
    from torchchat_core.cli.plots import plot_path
    from torchchat_core.measure.benchmark import ALL, passed_over, ways
    from torchchat_core.measure.busy import busy_warning, usage

    if flags["as_json"] and flags["as_csv"]:
        raise click.UsageError("--json and --csv exclude each other")
    plots = [plot_path(text) for text in flags["plot"]]
    request = model_request(flags)
    with shown_progress():
        wanted, before = ways(request, registry), usage()
        rows, failed = _measured(wanted, registry, flags)
        busy = busy_warning(before, usage())
        failed += passed_over(request, registry)
    name = request.model or request.checkpoint_path or "the default model"
    _print(name, rows, failed, flags)
    if busy is not None and rows:
        click.echo(f"warning: {busy}", err=True)
    if flags["save"]:
        _save(rows, registry)
    if rows:
        _draw(name, rows, failed, plots)
    everything = ALL in (request.executor, request.quantize)
    return int(not rows or (bool(failed) and not everything))


def _measured(wanted: Sequence[Way], registry: Registry, flags: dict[str, Any]) -> tuple[list[Row], list[Failed]]:
    from torchchat_core.measure.benchmark import Failed, measure_way

    rows, failed = [], []
    with task("measuring", total=len(wanted)) as done:
        for way in wanted:
            try:
                rows.append(measure_way(way, registry, flags["prompt_tokens"], flags["new_tokens"], flags["repeat"]))
            except TorchchatError as found:
                error = with_origin(found, click.get_current_context())
                failed.append(Failed(executor=way.executor, recipe=way.recipe, reason=error.message, fix=error.fix))
            done.advance(1)
    return rows, failed


def _print(name: str, rows: Sequence[Row], failed: Sequence[Failed], flags: dict[str, Any]) -> None:
    from torchchat_core.measure.benchmark_report import as_csv, as_json, failed_lines, table_lines

    if flags["as_json"]:
        click.echo(json.dumps(as_json(name, rows, failed)))
    elif flags["as_csv"]:
        click.echo(as_csv(rows), nl=False)
        for line in failed_lines(failed):
            click.echo(f"not measured: {line}", err=True)
    else:
        for line in table_lines(name, rows, failed, shutil.get_terminal_size().columns):
            click.echo(line)


def _save(rows: list[Row], registry: Registry) -> None:
    from torchchat_core.fastest import remember_executor
    from torchchat_core.measure.benchmark import fastest

    for row in fastest(rows, registry):
        path = remember_executor(row.reference, row.device, row.dtype, row.made_by, row.qualified_executor)
        what = f" with {row.recipe}" if row.recipe else ""
        click.echo(f"saved in {path}: {row.executor} is the fastest on {row.device} in {row.dtype}{what}", err=True)


def _draw(name: str, rows: Sequence[Row], failed: Sequence[Failed], plots: Sequence[Path]) -> None:
    from torchchat_core.cli.plots import is_picture
    from torchchat_core.measure.benchmark_plot import draw_png, html_page

    for path in plots:
        write_whole(path, draw_png(name, rows) if is_picture(path)
                    else html_page(name, rows, failed).encode(errors="replace"))
        click.echo(f"drawn: {path}", err=True)
