"""Show the flags of a command in sections: its own flags first, then those shared by all commands that open a model."""

from __future__ import annotations

from typing import Any

import click

SAMPLING, RUNNING, FILES = "Sampling", "How the model runs", "Where the model's files are"
SECTIONS = (SAMPLING, RUNNING, FILES)


class SectionOption(click.Option):
    """A flag in one of the help sections."""

    def __init__(self, *arguments: Any, section: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists its own flags first, then those of each section."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"Options": [], **{section: [] for section in SECTIONS}}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in rows.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)
