"""`torchchat chat`: a conversation on a terminal, or one message per line without one."""

from __future__ import annotations

import sys
from typing import Any

import click

from torchchat_core.cli.flags import generation_options, model_flags, sampling_flags
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.values import Number
from torchchat_core.plugins import Registry


@click.command(cls=SectionedCommand)
@model_flags
@click.option("--system", metavar="TEXT", help="A system message: how the model should answer.")
@click.option("--max-new-tokens", type=Number(minimum=1), default=None, metavar="N",
              help="Length of an answer; without it, until the model ends it.")
@sampling_flags
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer: text, token_ids, "
                                                      "finish_reason, stats.")
@click.pass_obj
def chat(registry: Registry, /, **flags: Any) -> int:
    """Talk with a model; without MODEL, with the one that comes with torchchat.

    /help lists the commands that you can type instead of a message. Without a terminal, each line of standard input
    is a message or a command, and the answers go to standard output.
    """
    generation_options(flags, {})  # a wrong value is an error before a model is loaded
    from torchchat_core.cli.chat_session import ChatSession, installed_models

    with ChatSession(flags, installed_models(registry)) as session:
        on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        if on_terminal and not flags["as_json"]:
            from torchchat_core.cli.terminal_chat import TerminalChat

            TerminalChat(session).run()
            return 0
        from torchchat_core.cli.piped_chat import PipedChat

        return PipedChat(session, flags["as_json"]).run()
