"""`torchchat quantize`: writes a model with fewer bytes, and says what became of each layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.amounts import bytes_text
from torchchat_core.cli.flags import model_flags, model_request
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.quantization.recipe import RecipeReport
    from torchchat_core.specs import LayerReport

RUNNING_ONLY = ("executor", "max_seq_length")  # flags of `model_flags` that say how a model is run


class QuantizeCommand(click.Command):
    def get_params(self, context: click.Context) -> list[click.Parameter]:
        return [parameter for parameter in super().get_params(context) if parameter.name not in RUNNING_ONLY]


@click.command(cls=QuantizeCommand)
@model_flags
@click.option("-o", "--output-dir", metavar="DIR", help="The folder to write, which must not exist or be empty.")
@click.option("--calibration", metavar="FILE", help="A plain text of the kind that the model is used for, for recipes "
                                                    "that look at one.")
@click.option("--calibration-tokens", type=click.IntRange(min=128), metavar="N",
              help="How much of its beginning is used [default: 32768].")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_obj
def quantize(registry: Registry, /, **flags: Any) -> None:
    """Write MODEL with fewer bytes, as a folder that loads without being quantised again.

    --quantize says how: layers that were done, those that were left alone and why, and the bytes of both are printed.
    """
    if flags["output_dir"] is None:
        raise click.UsageError("say where to write: --output-dir DIR")
    from torchchat_core.cli.opening import quantisation_line
    from torchchat_core.cli.progress_bars import shown_progress
    from torchchat_core.pipeline import quantise_model
    from torchchat_core.products import record, reference_of
    from torchchat_core.quantization.calibration import TOKENS, CalibrationText
    from torchchat_core.sources.hugging_face_folder import check_free

    request = model_request(flags)
    if request.quantize is None:
        raise click.UsageError("say how: --quantize with a recipe such as cpu, or a scheme such as linear:int4")
    if flags["calibration"] is None and flags["calibration_tokens"] is not None:
        raise click.UsageError("--calibration-tokens says how much of a text is used: --calibration FILE")
    text = None if flags["calibration"] is None else CalibrationText(
        path=expanded(flags["calibration"]), tokens=flags["calibration_tokens"] or TOKENS)
    folder = expanded(flags["output_dir"])
    check_free(folder)
    with shown_progress():
        files, report = quantise_model(request, folder, registry, text)
    record(reference_of(files.ref), "quantised", folder, ", ".join(sorted({str(done.scheme) for done in report.done})))
    if flags["as_json"]:
        click.echo(json.dumps(_json(report, str(folder))))
        return
    for line in report_lines(report):
        click.echo(line)
    click.echo(quantisation_line(report), err=True)
    click.echo(str(folder))


def report_lines(report: RecipeReport) -> Iterator[str]:
    """One line for layers that lie in a row and fared alike: how many, what was done, bytes before and after."""
    for _, group in groupby(report.layers, key=lambda layer: (layer.scheme, layer.reason, _family(layer.name))):
        layers = list(group)
        before, after = (sum(sizes) for sizes in zip(*((each.bytes_before, each.bytes_after) for each in layers),
                                                     strict=True))
        yield f"{_names(layers):44} {layers[0].scheme or 'left alone':15} {bytes_text(before):>8} -> " \
              f"{bytes_text(after):>8}" + (f"  {layers[0].reason}" if layers[0].reason else "")


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
