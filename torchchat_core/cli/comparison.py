"""Measuring recipes for a verb: what is compared, shown as a table, and drawn."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from torchchat_core.cli.plots import is_picture, plot_path
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.texts import text_of
from torchchat_core.errors import TorchchatError, UsageError
from torchchat_core.measure.comparing import (
    Candidate,
    Comparison,
    candidate,
    compare,
    default_candidates,
    folder_candidate,
)
from torchchat_core.measure.page import html_page
from torchchat_core.measure.png import draw_png
from torchchat_core.measure.summary import as_json, method_lines, table_lines
from torchchat_core.measure.text import CHARACTERS, MeasuredText
from torchchat_core.pipeline import ModelRequest, choose_device
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import RecipeReport, parse_recipe
from torchchat_core.small_files import expanded, write_whole


@dataclass
class Measurement:
    """What the flags ask for; everything that can be wrong with them is found before anything is measured."""

    registry: Registry
    request: ModelRequest
    candidates: list[Candidate]
    named: bool  # by the user, who then wants to know of those that cannot run by the exit status too
    text: MeasuredText
    window: int | None
    plots: Sequence[Path]
    silent: bool  # no table
    json: dict[str, Any] = field(default_factory=dict)
    comparison: Comparison | None = None  # what was measured

    @classmethod
    def planned(cls, request: ModelRequest, flags: Mapping[str, Any], registry: Registry) -> Measurement:
        """Raises `TorchchatError` and `click.UsageError` for what cannot be."""
        choose_device(request.device)
        named = [name for name in (request.quantize, *flags["compare"]) if name is not None]
        twice = [name for name in named if named.count(name) > 1]
        if twice:
            raise click.UsageError(f"{twice[0]} is to be compared twice")
        candidates = [_candidate(name, request, registry) for name in named] or default_candidates(request, registry)
        if request.calibration is not None and not any(each.request.calibration for each in candidates):
            raise click.UsageError("--calibration: none of the recipes looks at a text")
        return cls(registry=registry, request=request, candidates=candidates, named=bool(named),
                   text=text_of(flags, CHARACTERS), window=flags["window"],
                   plots=[plot_path(text) for text in flags["plot"]], silent=flags["as_json"])

    def take_folder(self, folder: str, report: RecipeReport) -> None:
        """The recipe of --quantize is measured as the folder that was just written, not quantised once more."""
        first = self.candidates[0]
        device = parse_recipe(first.name, self.registry).device
        self.candidates[0] = folder_candidate(folder, self.request, first.name, device, report)

    def run(self) -> int:
        """Measures and prints; the exit status."""
        with shown_progress():
            comparison = compare(self.request, self.candidates, self.registry, self.text, self.window)
        self.json = as_json(comparison)
        if not self.silent:
            for line in table_lines(comparison, shutil.get_terminal_size().columns):
                click.echo(line)
        self.comparison = comparison
        return int(self.named and bool(comparison.refused))

    def draw(self) -> None:
        """What was measured, after it was printed: a picture that cannot be written costs no figures."""
        if self.comparison is None:
            raise RuntimeError("nothing was measured yet")
        for path in self.plots:
            _draw(self.comparison, path)
            click.echo(f"drawn: {path}", err=True)


def _candidate(name: str, request: ModelRequest, registry: Registry) -> Candidate:
    try:
        return candidate(name, request, registry)
    except TorchchatError as error:
        if name == request.quantize:
            raise
        fix = f"{error.fix}; MODEL goes before --compare" if error.fix else None
        kind = TorchchatError if expanded(name).exists() else UsageError  # what a file or folder holds is no usage
        raise kind(f"--compare: {error.message}", fix) from None


def _draw(comparison: Comparison, path: Path) -> None:
    if is_picture(path):
        heading = f"{comparison.model}: {next(method_lines(comparison))}"
        write_whole(path, draw_png(comparison, heading))
    else:
        write_whole(path, html_page(comparison).encode(errors="replace"))
