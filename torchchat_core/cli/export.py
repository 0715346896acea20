"""`torchchat export`: writes a model to a file that runs elsewhere."""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from torchchat_core.cli.flags import EXPORTED, model_flags, model_request
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.errors import TorchchatError, UsageError, did_you_mean, quoted
from torchchat_core.options import detail_of, from_text
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.small_files import output_file
from torchchat_core.specs import ExporterInfo

OUTPUT = "output"
# Flags of `model_flags` that say how a model is run.
RUNNING_ONLY = ("executor", "keep_quantized", *(flag[2:].replace("-", "_") for flag in EXPORTED))


class ExportCommand(SectionedCommand):
    """A command whose flags are also those that the installed exporters declare."""

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        own = [parameter for parameter in super().get_params(context) if parameter.name not in RUNNING_ONLY]
        registry = context.obj or load_registry()
        exporters = registry.infos(ExporterInfo)
        return [*own[:-1], *_path_flags(exporters), *_preset_flag(exporters), *_option_flags(exporters), own[-1]]


def _path_flags(exporters: list[ExporterInfo]) -> list[click.Parameter]:
    """One flag for each exporter that declares one."""
    return [click.Option([info.flag, _path_name(info)], metavar="FILE", help=f"Where to write {info.summary}.")
            for info in exporters if info.flag]


def _preset_flag(exporters: list[ExporterInfo]) -> list[click.Parameter]:
    """--preset, where an exporter has presets."""
    presets = {preset.name: preset.summary for info in exporters for preset in info.presets}
    if not presets:
        return []
    listed = "; ".join(f"{name}: {summary}" for name, summary in presets.items())
    return [click.Option(["--preset"], metavar="NAME", help="Choices of recipe and options under one name, which other "
                                                            f"flags go before [{listed}].")]


def _option_flags(exporters: list[ExporterInfo]) -> list[click.Parameter]:
    """One flag for each name among the exporters' options: several exporters may have an option of one name."""
    owners: dict[str, list[tuple[ExporterInfo, Field[Any]]]] = {}
    for info in exporters:
        for field in fields(info.options) if info.options else ():
            owners.setdefault(field.name, []).append((info, field))
    flags: list[click.Parameter] = []
    for name, declared in owners.items():
        detail = detail_of(declared[0][1])
        default = declared[0][1].default
        known = [f"of {', '.join(info.name for info, _ in declared)}", *([detail.range] if detail.range else []),
                 f"default {default}"]
        flags.append(click.Option([f"--{name.replace('_', '-')}", name], metavar="VALUE",
                                  help=f"{detail.help[0].upper() + detail.help[1:]} [{'; '.join(known)}]"))
    return flags


@click.command(cls=ExportCommand)
@model_flags
@click.option("-o", "--output", OUTPUT, metavar="FILE", help="Where to write; its ending chooses the format.")
@click.pass_obj
def export(registry: Registry, /, **flags: Any) -> None:
    """Write MODEL to a file that runs elsewhere.

    The file's ending, or the flag that names it, chooses the exporter. A file that exists is replaced when the new
    one is whole.
    """
    exporter, path = _target(flags, registry)
    flags, longest = _with_preset(exporter, flags)
    options = _options(exporter, flags, registry)
    from torchchat_core.cli.progress_bars import shown_progress
    from torchchat_core.pipeline import export_model
    from torchchat_core.products import record, reference_of

    with shown_progress():
        files = export_model(model_request(flags), exporter, path, options, registry, longest)
    record(reference_of(files.ref), "export", path, exporter.writes)
    click.echo(str(path))


def _target(flags: dict[str, Any], registry: Registry) -> tuple[ExporterInfo, Path]:
    """What writes, and where to. Raises `TorchchatError` or a usage error where that is not one answer."""
    exporters = registry.infos(ExporterInfo)
    if not exporters:
        ending = Path(flags[OUTPUT] or "").suffix.lower()
        raise TorchchatError("no exporter is installed", registry.how_to_get("writes", ending)
                             or registry.how_to_get("exporters"))
    named = [(info, flags[_path_name(info)]) for info in exporters if info.flag and flags.get(_path_name(info))]
    if len(named) + (flags[OUTPUT] is not None) > 1:
        given = [info.flag for info, _ in named] + (["-o"] if flags[OUTPUT] is not None else [])
        raise click.UsageError(f"{' and '.join(given)} exclude each other: one file is written at a time")
    if named:
        return named[0][0], output_file(named[0][0].flag, named[0][1])
    listed = ", ".join(f"{info.suffix} ({info.name})" for info in exporters)
    if flags[OUTPUT] is None:
        raise click.UsageError(f"say where to write: -o FILE, with one of the endings {listed}")
    path = output_file("-o", flags[OUTPUT])
    fitting = [info for info in exporters if info.suffix == path.suffix.lower()]
    if not path.suffix and len(exporters) == 1:
        return exporters[0], path
    if len(fitting) != 1:
        what = "no extension" if not path.suffix else f"the extension {quoted(path.suffix)}"
        fix = registry.how_to_get("writes", path.suffix.lower()) or "give the file one of these extensions"
        raise UsageError(f"-o is {quoted(path.name)}, which has {what}; the installed exporters write {listed}", fix)
    return fitting[0], path


def _with_preset(exporter: ExporterInfo, flags: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The flags, with what the preset says where the user says nothing; and its length, which models that are shorter
    do not reach. Raises `TorchchatError` for an unknown one."""
    wanted = flags.pop("preset", None)
    if wanted is None:
        return flags, None
    preset = next((each for each in exporter.presets if each.name == wanted), None)
    if preset is None:
        names = [each.name for each in exporter.presets]
        known = f"it has {', '.join(names)}" if names else "it has none"
        fix = did_you_mean(wanted, names) or (f"--preset {' or '.join(names)}" if names else "leave --preset out")
        raise UsageError(f"--preset: the exporter {quoted(exporter.name)} has no preset {quoted(wanted)}; {known}", fix)
    chosen = {"quantize": preset.quantize, **preset.options}
    unsaid = {name: value for name, value in chosen.items() if flags.get(name) is None}
    return {**flags, **unsaid}, preset.max_seq_length


def _path_name(info: ExporterInfo) -> str:
    return info.flag.removeprefix("--").replace("-", "_")


def _options(exporter: ExporterInfo, flags: dict[str, Any], registry: Registry) -> Any:
    """The exporter's options. Raises `TorchchatError` for one that only other exporters have, or a wrong value."""
    own = {field.name for field in fields(exporter.options)} if exporter.options else set()
    all_names = {field.name for info in registry.infos(ExporterInfo) if info.options for field in fields(info.options)}
    foreign = next((name for name in sorted(all_names - own) if flags.get(name) is not None), None)
    if foreign is not None:
        raise UsageError(f"--{foreign.replace('_', '-')} is not an option of the exporter {quoted(exporter.name)}")
    if exporter.options is None:
        return None
    try:
        given = {name: from_text(exporter.options, name, flags[name], f"--{name.replace('_', '-')}")
                 for name in own if flags.get(name) is not None}
        return exporter.options(**given)
    except TorchchatError as error:
        raise UsageError(error.message, error.fix) from None
