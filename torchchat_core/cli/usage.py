"""Explain a command line that cannot be parsed: an error and one thing to try, never a misleading hint."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import cast

import click

from torchchat_core.cli.values import flag_name
from torchchat_core.errors import TorchchatError, UsageError, near_matches, quoted
from torchchat_core.known_plugins import install_command, providers
from torchchat_core.plugins import Registry
from torchchat_core.specs import CommandInfo

OTHER_TOOLS = Path(__file__).resolve().parent.parent / "data" / "other_tools.json"  # commands and flags of other tools


@cache
def _other_tools() -> dict[str, dict[str, str]]:
    return cast("dict[str, dict[str, str]]", json.loads(OTHER_TOOLS.read_text(encoding="utf-8")))


def unknown_verb(name: str, registry: Registry) -> UsageError:
    """Return the error for an unknown command. The fix is how to install it, our equivalent, or a similar name."""
    verbs = [info.name for info in registry.infos(CommandInfo)]
    near = near_matches(name, verbs)
    fix = registry.how_to_get("commands", name) or _other_tools()["verbs"].get(name.lower()) \
        or (f"torchchat {' or torchchat '.join(near)}" if near else None) \
        or (f"torchchat chat {shlex.quote(name)}" if _is_model(name, registry) else None) \
        or "torchchat --help, which lists the commands"
    return UsageError(f"there is no command {quoted(name)}", fix)


def _is_model(text: str, registry: Registry) -> bool:
    """Return True if a word in place of a verb is a model: a path that exists, a known name, owner/name or a URL."""
    from torchchat_core.sources.reference import resolve

    try:
        return bool(resolve(text, registry))
    except TorchchatError:
        return False


def explained(error: click.UsageError, arguments: Sequence[str] = ()) -> tuple[str, str | None]:
    """Return the message and what to try for an error that click found in the `arguments`."""
    context = error.ctx
    verb = next((word for word in arguments if not word.startswith(("-", "no:"))), "")
    path = context.command_path if context is not None else f"torchchat {verb}".strip()
    help_command = f"{path} --help"
    if isinstance(error, click.NoSuchOption):
        return _no_such_option(error, path)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return f"{path} needs a command", f"{help_command}, which lists the commands"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        what = flag_name(error.param)
        if not isinstance(error.param, click.Argument) or context is None:
            return f"{what} is missing", f"{what} {error.param.metavar or ''}".strip()
        return f"{what} is missing", " ".join([path, *context.command.collect_usage_pieces(context)[1:]])
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{flag_name(error.param)}: {error.message.rstrip('.')}", help_command
    extra = re.match(r"Got unexpected extra arguments? \((.*)\)", error.message, re.DOTALL)
    if extra:
        return _extra_words(extra[1], context, path)
    needs_value = re.match(r"Option '(\S+)' requires an argument", error.message)
    if needs_value:
        return f"{needs_value[1]} needs a value", help_command
    message = error.message.rstrip(".")
    return message[:1].lower() + message[1:] if message[:1].isalpha() and message[1:2].islower() else message, \
        help_command


def _no_such_option(error: click.NoSuchOption, path: str) -> tuple[str, str]:
    name, context = error.option_name, error.ctx
    parameters = context.command.get_params(context) if context is not None else []
    known = [flag for parameter in parameters if isinstance(parameter, click.Option) for flag in parameter.opts]
    message = f"there is no option {quoted(name)} of {path}"
    dashed = name.lower().replace("_", "-")
    other = _other_tools()["flags"].get(name)
    if dashed in known:
        return message, dashed
    if found := providers("flags", name):
        return message, install_command(found)
    if other is not None and (other.split()[0].rstrip(",") in known or not other.startswith("-")):
        return message, other.replace("VERB", path.rpartition(" ")[2] if " " in path else "chat")
    near = [flag for flag in near_matches(name, known) if flag.startswith("--")]
    return message, " or ".join(near) if near else f"{path} --help, which lists the options"


def _extra_words(text: str, context: click.Context | None, path: str) -> tuple[str, str]:
    """Return the error for extra arguments, which are often the prompt if the command takes a model."""
    message = f"{path} takes no further argument: {quoted(text)}"
    names = {parameter.name for parameter in context.command.params} if context is not None else set()
    if "prompt" in names:
        return message, f"{path} MODEL --prompt {shlex.quote(text[:60])}"
    if "system" in names:
        return message, "type messages after the chat has started, or use torchchat generate MODEL --prompt TEXT"
    return message, f"{path} --help"


def refuse_words_as_model(model: object) -> None:
    """Raise `UsageError` if MODEL contains spaces and is not a path: the user probably typed a prompt."""
    if not isinstance(model, str) or not re.search(r"\S\s+\S", model) or Path(model).expanduser().exists():
        return
    context = click.get_current_context(silent=True)
    names = {parameter.name for parameter in context.command.params} if context is not None else set()
    if names & {"prompt", "system"}:
        raise UsageError(f"there is no model {quoted(model)}; a prompt needs --prompt",
                         f"torchchat generate --prompt {shlex.quote(model[:60])}")
