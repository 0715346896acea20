"""`torchchat browser`: the chat as a web page."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import generation_options, model_flags, model_request, sampling_flags
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.server import LOCAL
from torchchat_core.cli.values import Number
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from tc_streamlit_chat.configuration import Configuration
    from tc_streamlit_chat.local import LocalModels
    from tc_streamlit_chat.remote import RemoteModels
    from tc_streamlit_chat.services import Services

PORT = 5000


@click.command(cls=SectionedCommand)
@model_flags
@click.option("--system", metavar="TEXT", help="A system message: how the model should answer.")
@click.option("--max-new-tokens", type=Number(minimum=1), default=None, metavar="N",
              help="Length of an answer; without it, until the model ends it.")
@click.option("--num-samples", type=Number(minimum=1, maximum=16), default=1, show_default=True, metavar="N",
              help="Answers to each message, to choose from.")
@sampling_flags
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=Number(minimum=0, maximum=65535), default=PORT, show_default=True, metavar="N",
              help="Where to listen; 0: any port that is free.")
@click.option("--url", metavar="URL", help="Talk to this server of OpenAI's interface instead of running a model here; "
                                           "MODEL is then one of its models.")
@click.option("--api-key", metavar="KEY", envvar="TORCHCHAT_API_KEY", help="What that server wants to know; also "
                                                                           "TORCHCHAT_API_KEY.")
@click.option("--conversations", metavar="FILE", help="Where conversations are kept [default: "
                                                      "conversations.sqlite3 in torchchat's data folder].")
@click.option("--max-loaded", type=Number(minimum=0), default=2, show_default=True, metavar="N",
              help="Models in memory at once; 0: any number.")
@click.option("--memory-limit", type=Number(minimum=0), default=0, metavar="MIB",
              help="What the weights of all models in memory may take together [default: any].")
@click.pass_obj
def browser(registry: Registry, /, **flags: Any) -> int:
    """Chat with a model in the browser; without MODEL, with the one that comes with torchchat.

    The page is at http://127.0.0.1:5000. Executor, recipe, sampling and more can be changed there, and are at first
    what the flags say. Conversations are kept. Ctrl-C ends it.
    """
    for name in ("streamlit", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise TorchchatError(f"the browser chat needs {name}", "pip install tc-streamlit-chat")
    generation_options(flags, {})  # wrong values are told before a model is loaded
    _check_usage(flags)
    from tc_streamlit_chat.services import install
    from tc_streamlit_chat.serving import make_app, serve
    from torchchat_core.server.running import listen

    private = flags["host"] in LOCAL
    if not private:
        click.echo(f"warning: whoever reaches {flags['host']} can use this page, and its models", err=True)
    with closing(listen(flags["host"], flags["port"])) as listener, \
            closing(make_services(flags, registry, private)) as services:  # a port that is taken is told at once
        install(services)
        try:
            return serve(make_app(private), flags["host"], listener,
                         lambda address: click.echo(f"Running on {address}"))
        finally:
            install(None)


HERE = ("checkpoint_path", "gguf_path", "dso_path", "aoti_package_path", "pte_path", "params_path", "tokenizer_path",
        "adapter", "hf_token", "quantize", "keep_quantized", "executor", "device", "dtype", "max_seq_length",
        "memory_limit")  # flags that say how a model runs on this machine


def _check_usage(flags: Mapping[str, Any]) -> None:
    """Raises `click.UsageError` for flags that would be of no use."""
    source = click.get_current_context().get_parameter_source
    typed = click.core.ParameterSource.COMMANDLINE
    if flags["url"] is None:
        if source("api_key") is typed:
            raise click.UsageError("--api-key is for the server that --url names")
        return
    unused = [name for name in (*HERE, "max_loaded") if source(name) is typed]
    if unused:
        raise click.UsageError(f"--{unused[0].replace('_', '-')} is for models that run here, and --url names a server")


def make_services(flags: Mapping[str, Any], registry: Registry, private: bool) -> Services:
    """What pages need, with the first model loaded. Raises `TorchchatError` where it cannot be."""
    from tc_streamlit_chat.jobs import Jobs
    from tc_streamlit_chat.services import Services
    from tc_streamlit_chat.store import Store, default_path
    from tc_streamlit_chat.turns import Turns

    store = Store(expanded(flags["conversations"]) if flags["conversations"] else default_path())
    models = _remote(flags) if flags["url"] is not None else _local(flags, registry)
    made = Services(registry=registry, models=models, turns=Turns(models), store=store, jobs=Jobs(),
                    start=_configuration(flags), private=private)
    try:
        _prepare(made)
    except BaseException:
        made.close()
        raise
    return made


def _prepare(made: Services) -> None:
    """Loads the model, or looks for the server: what is wrong is told here, and not on the page."""
    from tc_streamlit_chat.local import LocalModels
    from torchchat_core.pipeline import fetch_files

    if not isinstance(made.models, LocalModels):
        made.models.connect()
        if made.models.model not in made.models.models:  # some servers take more than they list
            click.echo(f"warning: {made.models.url} lists no model {quoted(made.models.model)}; it has "
                       f"{', '.join(made.models.models[:8])}", err=True)
        return
    base = made.models.base
    with shown_progress():
        fetch_files(base, made.registry)
    made.turns.run(made.models.load(base, lambda _: None)).result()


def _local(flags: Mapping[str, Any], registry: Registry) -> LocalModels:
    from tc_streamlit_chat.local import LocalModels

    return LocalModels(model_request(flags), registry, max_loaded=flags["max_loaded"],
                       memory_limit=flags["memory_limit"])


def _remote(flags: Mapping[str, Any]) -> RemoteModels:
    from tc_streamlit_chat.remote import RemoteModels

    return RemoteModels(flags["url"], flags["api_key"], flags["model"])


def _configuration(flags: Mapping[str, Any]) -> Configuration:
    """Of a new conversation: what the flags say."""
    from tc_streamlit_chat.configuration import SAMPLING, Configuration

    asked = generation_options(flags, {})
    chosen = {name: getattr(asked.sampling, name) for name in SAMPLING if flags.get(name) not in (None, ())}
    return Configuration(system=flags["system"] or "", sampling=chosen, max_new_tokens=asked.max_new_tokens,
                         stop=asked.stop, num_samples=flags["num_samples"])
