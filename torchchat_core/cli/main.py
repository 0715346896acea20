"""The command `torchchat`: finds the verbs that are installed, and turns errors into two lines."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import click

from torchchat_core import __version__
from torchchat_core.errors import LONGEST_MESSAGE, TorchchatError, UsageError, quoted, shortened
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.settings import load_settings
from torchchat_core.specs import CommandInfo

DISABLED = "torchchat.disabled"


class Verbs(click.Group):
    """A click group whose commands are those of the registry, imported when they are used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [info.name for info in sorted(_registry(context).infos(CommandInfo), key=lambda info: info.order)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        registry = _registry(context)
        if not any(name in (qualified, info.name) for qualified, info in registry.offers(CommandInfo)):
            from torchchat_core.cli.usage import unknown_verb

            raise unknown_verb(name, registry)
        command: click.Command = registry.find(CommandInfo, name).make()
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except TorchchatError as error:
            from torchchat_core.cli.setting_values import with_origin

            detailed = with_origin(error, context)
            if detailed is error:
                raise
            raise detailed from error

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """As click writes it, but from the descriptions: no command is imported for its help line."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for info in sorted(_registry(context).infos(CommandInfo), key=lambda info: info.order):
            groups.setdefault(info.group, []).append((info.name, info.summary))
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows, col_max=12)


def _registry(context: click.Context) -> Registry:
    root = context.find_root()
    if root.obj is None:
        root.obj = load_registry(disabled=root.meta.get(DISABLED, ()), prefer=_preferences())
        for warning in root.obj.warnings:
            click.echo(f"warning: {warning}", err=True)
    found: Registry = root.obj
    return found


def _preferences() -> dict[str, str]:
    """What the user prefers for contested names; a damaged file must not keep `doctor` and `config` from helping."""
    try:
        return load_settings().prefer
    except TorchchatError as error:
        click.echo(f"warning: {error}", err=True)
        return {}


def _switch_off(context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> None:
    for value in values:
        if not value.startswith("no:"):
            raise UsageError(f"-p is {quoted(value)}; expected no:NAME, the plugin to disable",
                             f"torchchat -p {quoted('no:' + value)[1:-1]} COMMAND")
    context.meta[DISABLED] = tuple(value.removeprefix("no:") for value in values)


@click.command(
    cls=Verbs, name="torchchat", context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is a name from 'torchchat list', a Hugging Face repository, a folder, a file or a URL. "
           "'torchchat COMMAND --help' describes a command.",
)
@click.version_option(__version__, prog_name="torchchat")
@click.option("-p", "plugins", metavar="no:NAME", multiple=True, is_eager=True, expose_value=False,
              callback=_switch_off, help="Disable the plugin NAME; may be repeated.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def torchchat() -> None:
    """Run, quantize, measure and export large language models with PyTorch."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exit, so that half-written files go
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    if debug:
        import logging  # imported late, because it takes some milliseconds

        logging.getLogger("torchchat").setLevel(logging.DEBUG)
    try:
        sys.exit(_run(given))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output went away; do not complain to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except TorchchatError as error:
        if debug:
            raise
        _report(error.message, error.fix)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        if debug:
            raise
        _report(f"{error.filename or 'reading or writing'}: {error.strerror or error}", None)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics in Rust libraries are not an `Exception`
        if debug:
            raise
        _report(f"{type(error).__name__}: {error}", "this is a fault of torchchat or of a plugin; --debug shows where")
    sys.exit(1)


def _run(arguments: list[str]) -> int:
    try:
        result: Any = torchchat.main(args=arguments, prog_name="torchchat", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.Abort:
        return 130
    except click.UsageError as error:
        from torchchat_core.cli.usage import explained

        _report(*explained(error, arguments))
        return error.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        for line in shown.getvalue().splitlines():
            click.echo(shortened(line, LONGEST_MESSAGE), err=True)
        return error.exit_code


def _report(message: str, fix: str | None) -> None:
    click.echo(f"error: {shortened(message, LONGEST_MESSAGE)}", err=True)
    if fix:
        click.echo(f"try: {fix}", err=True)
