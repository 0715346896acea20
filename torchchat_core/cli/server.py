"""`torchchat server`: OpenAI's interface over HTTP."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import Function, model_flags, model_request
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.values import Checked, Number, OptionValue
from torchchat_core.errors import TorchchatError, UsageError, quoted
from torchchat_core.options import detail_of
from torchchat_core.plugins import Registry
from torchchat_core.server.limits import Limits

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

LOCAL = ("127.0.0.1", "::1", "localhost")


def limit_flags(function: Function) -> Function:
    """One flag for each field of `Limits`."""
    for field in reversed(dataclasses.fields(Limits)):
        detail = detail_of(field)
        sentence = detail.help[0].upper() + detail.help[1:]
        function = click.option(
            f"--{field.name.replace('_', '-')}", type=OptionValue(Limits, field.name), metavar="N",
            default=field.default, help=f"{sentence} [{detail.range}; default {field.default:g}]",
        )(function)
    return function


def _check_origin(text: str) -> None:
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", text):
        host = text.partition("://")[2].partition("/")[0] or text.partition("/")[0]
        raise TorchchatError(f"{quoted(text)} is no origin; browsers send SCHEME://HOST or SCHEME://HOST:PORT, "
                             "without a path", f"--allow-origin {shlex.quote('https://' + host.lower())}"
                             if re.fullmatch(r"[\w.:-]+", host) else "--allow-origin https://example.org")


@click.command(cls=SectionedCommand)
@model_flags
@click.option("--model", "models", metavar="NAME[=MODEL]", multiple=True, help="A further model, loaded when it is "
              "first asked for; may be repeated. NAME is what requests call it.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=Number(minimum=0, maximum=65535), default=8000, show_default=True, metavar="N",
              help="Where to listen; 0: any port that is free.")
@click.option("--api-key", metavar="KEY", envvar="TORCHCHAT_API_KEY", help="What requests have to know, but for "
              "/health; also TORCHCHAT_API_KEY.")
@click.option("--allow-origin", "origins", metavar="ORIGIN", multiple=True, type=Checked(_check_origin),
              help="A web page whose scripts may use the server, such as https://example.org; may be repeated.")
@limit_flags
@click.pass_obj
def server(registry: Registry, /, **flags: Any) -> int:
    """Serve models by OpenAI's HTTP interface.

    Chat completions, completions, responses and embeddings, streamed or not, at http://ADDRESS:PORT/v1; requests are
    answered together where the executor can. SIGTERM and Ctrl-C let answers in progress come to their end.
    """
    missing = [name for name in ("starlette", "uvicorn", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise TorchchatError(f"the server needs {', '.join(missing)}", "pip install 'torchchat-core[server]'")
    limits = Limits(**{field.name: flags[field.name] for field in dataclasses.fields(Limits)})
    if flags["api_key"] == "":
        raise UsageError("--api-key is empty", "leave it out, or give a key")
    if flags["host"] not in LOCAL and flags["api_key"] is None:
        click.echo(f"warning: whoever reaches {flags['host']} can use this server; --api-key K asks for a key",
                   err=True)
    from torchchat_core.server.app import ServerOptions, make_app
    from torchchat_core.server.running import run

    options = ServerOptions(models=named_requests(flags), limits=limits, api_key=flags["api_key"],
                            origins=flags["origins"], local=flags["host"] in LOCAL)
    return run(make_app(options, registry), flags["host"], flags["port"], limits.grace,
               lambda address: click.echo(f"Serving {', '.join(options.models)} on {address}/v1", err=True))


def named_requests(flags: Mapping[str, Any]) -> dict[str, ModelRequest]:
    """The models by name: MODEL, then those of --model, which are run in the same way."""
    first = model_request(flags)
    found: dict[str, ModelRequest] = {}
    if first.model is not None or first.checkpoint_path is not None or not flags["models"]:
        found[_name(first.model or first.checkpoint_path or "embedded")] = first
    for text in flags["models"]:
        name, equals, model = text.partition("=")
        model, name = (model, name) if equals else (text, _name(text))
        if not name or not model:
            raise UsageError(f"--model is {quoted(text)}; it has to be MODEL or NAME=MODEL")
        if name in found:
            raise UsageError(f"--model: two models are called {quoted(name)}",
                             "give one of them another name: --model NAME=MODEL")
        found[name] = dataclasses.replace(first, model=model, checkpoint_path=None, params_path=None,
                                          tokenizer_path=None, adapter=None)
    return found


def _name(model: str) -> str:
    """What requests call a model: a path's last part, and any other text as it was typed."""
    path = Path(model).expanduser()
    return path.name if path.exists() and path.name else model

