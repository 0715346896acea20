"""The browser chat of torchchat: `torchchat browser`."""

from __future__ import annotations

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import CommandInfo

__version__ = "0.1.0"


@hookimpl
def torchchat_commands() -> list[CommandInfo]:
    return [CommandInfo(
        name="browser",
        summary="Chat with a model in the browser.",
        factory="tc_streamlit_chat.command:browser",
        order=15,
        group="Use a model",
    )]
