"""`torchchat quantize`: writes a model with fewer bytes, says what became of each layer, and measures what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.amounts import size_text
from torchchat_core.cli.completion import complete_scheme
from torchchat_core.cli.flags import model_flags, model_request
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.opening import quantisation_lines
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.texts import text_flags
from torchchat_core.cli.values import Number
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest
    from torchchat_core.quantization.recipe import RecipeReport
    from torchchat_core.specs import LayerReport

NOT_HERE = ("keep_quantized", "max_seq_length")  # flags of `model_flags` that neither writing nor measuring takes
MEASURING = ("file", "characters", "window", "plot", "executor")  # flags that only a measurement takes
COMPARE = "--compare"


class QuantizeCommand(SectionedCommand):
    """With `--compare A B ...`: every word up to the next option, or up to `--`, is one more recipe."""

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        return [parameter for parameter in super().get_params(context) if parameter.name not in NOT_HERE]

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(context, spread(args))


def spread(words: list[str]) -> list[str]:
    """`--compare A B` as `--compare A --compare B`, which click understands."""
    found: list[str] = []
    comparing = options_ended = False
    for word in words:
        comparing = comparing and not word.startswith("-")
        if comparing and found[-1] != COMPARE:
            found.append(COMPARE)
        found.append(word)
        options_ended = options_ended or word == "--"
        comparing = comparing or (word == COMPARE and not options_ended)
    return found


@click.command(cls=QuantizeCommand)
@model_flags
@click.option("-o", "--output-dir", metavar="DIR", help="The folder to write, which must not exist or be empty.")
@click.option("--report", is_flag=True, help="Measure size, speed, perplexity and KL divergence beside the unquantised "
                                             "model: of --quantize's recipe or, without it, of all recipes and schemes "
                                             "that are installed.")
@click.option(COMPARE, multiple=True, metavar="RECIPE ...", shell_complete=complete_scheme,
              help="Measure these recipes, or folders that quantize wrote. Every word belongs to it up to the next "
                   "option or --, so MODEL goes before it.")
@text_flags(8000)
@click.option("--plot", multiple=True, metavar="FILE", help="Draw the measurement: FILE.png, or FILE.html, a page that "
                                                            "needs nothing else; may be repeated.")
@click.option("--calibration", "calibration_path", metavar="FILE",
              help="A plain text of the kind that the model is used for, for recipes that look at one.")
@click.option("--calibration-tokens", type=Number(minimum=128), metavar="N",
              help="How much of its beginning is used [default: 32768].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def quantize(registry: Registry, /, **flags: Any) -> int:
    """Write MODEL with fewer bytes, as a folder that loads without being quantised again; or measure what that costs.

    --quantize says how: layers that were done, those that were left alone and why, and the bytes of both are printed.
    --report and --compare measure, with or without --output-dir; status 1 where a recipe that was named cannot run.
    """
    measuring = flags["report"] or bool(flags["compare"])
    _check_usage(flags, measuring)
    from torchchat_core.cli.comparison import Measurement

    request = _request(flags)
    measurement = Measurement.planned(request, flags, registry) if measuring else None
    result: dict[str, Any] = {}
    if flags["output_dir"] is not None:
        if measurement is not None:  # the text may be for others of the recipes
            request = replace(request, calibration=measurement.candidates[0].request.calibration)
        folder, report = _write(request, flags["output_dir"], registry)
        result = _json(report, folder)
        if not flags["as_json"]:
            for line in report_lines(report):
                click.echo(line)
            for line in quantisation_lines(report):
                click.echo(line, err=True)
            click.echo(folder)
        if measurement is not None:
            measurement.take_folder(folder, report)
    status = 0
    if measurement is not None:
        status = measurement.run()
        result["report"] = measurement.json
    if flags["as_json"]:
        click.echo(json.dumps(result if flags["output_dir"] is not None else result["report"]))
    if measurement is not None:
        measurement.draw()
    return status


def _check_usage(flags: dict[str, Any], measuring: bool) -> None:
    if flags["output_dir"] is None and not measuring:
        raise click.UsageError("say where to write: --output-dir DIR; or measure: --report")
    if flags["output_dir"] is not None and flags["quantize"] is None:
        raise click.UsageError("say how: --quantize with a recipe such as cpu, or a scheme such as linear:int4")
    unused = [name for name in MEASURING if flags.get(name) and not measuring]
    if unused:
        raise click.UsageError(f"--{unused[0]} goes with --report or {COMPARE}")
    if flags["calibration_path"] is None and flags["calibration_tokens"] is not None:
        raise click.UsageError("--calibration-tokens says how much of a text is used: --calibration FILE")


def _request(flags: dict[str, Any]) -> ModelRequest:
    from torchchat_core.quantization.calibration import TOKENS, CalibrationText

    request = model_request(flags)
    if flags["calibration_path"] is None:
        return request
    return replace(request, calibration=CalibrationText(path=expanded(flags["calibration_path"]),
                                                        tokens=flags["calibration_tokens"] or TOKENS))


def _write(request: ModelRequest, output_dir: str, registry: Registry) -> tuple[str, RecipeReport]:
    """Writes the folder; its path, and what became of the layers."""
    from torchchat_core.pipeline import quantise_model
    from torchchat_core.products import record, reference_of
    from torchchat_core.sources.hugging_face_folder import check_free

    folder = expanded(output_dir)
    check_free(folder)
    with shown_progress():
        files, report = quantise_model(request, folder, registry)
    record(reference_of(files.ref), "quantised", folder, ", ".join(sorted({str(done.scheme) for done in report.done})))
    return str(folder), report


def report_lines(report: RecipeReport) -> Iterator[str]:
    """One line for layers that lie in a row and fared alike: how many, what was done, bytes before and after."""
    for _, group in groupby(report.layers, key=lambda layer: (layer.scheme, layer.reason, _family(layer.name))):
        layers = list(group)
        before, after = (sum(sizes) for sizes in zip(*((each.bytes_before, each.bytes_after) for each in layers),
                                                     strict=True))
        yield f"{_names(layers):44} {layers[0].scheme or 'left alone':15} {size_text(before):>8} -> " \
              f"{size_text(after):>8}" + (f"  {layers[0].reason}" if layers[0].reason else "")


def _family(name: str) -> str:
    """The names of a decoder layer's matrices are one family: "model.layers.3"."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else name


def _names(layers: list[LayerReport]) -> str:
    first = layers[0].name
    return first if len(layers) == 1 else f"{_family(first)}.* ({len(layers)} layers)"


def _json(report: RecipeReport, folder: str) -> dict[str, Any]:
    layers = [{"name": layer.name, "scheme": layer.scheme, "reason": layer.reason, "bytes_before": layer.bytes_before,
               "bytes_after": layer.bytes_after} for layer in report.layers]
    return {"folder": folder, "bytes_before": report.bytes_before, "bytes_after": report.bytes_after, "layers": layers}
