"""`torchchat chat`: a conversation on a terminal, or one message per line without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import generation_options, model_flags, sampling_flags
from torchchat_core.cli.opening import opened_model
from torchchat_core.plugins import Registry

if TYPE_CHECKING:
    from torchchat_core.conversation import Conversation
    from torchchat_core.generation_options import GenerationOptions
    from torchchat_core.pipeline import OpenedModel


@click.command()
@model_flags
@click.option("--system", metavar="TEXT", help="A system message: how the model should answer.")
@click.option("--max-new-tokens", type=int, default=None, metavar="N",
              help="Length of an answer; without it, until the model ends it.")
@sampling_flags
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer: text, token_ids, "
                                                      "finish_reason, stats.")
@click.pass_obj
def chat(registry: Registry, /, **flags: Any) -> int:
    """Talk with a model; without MODEL, with the one that comes with torchchat.

    On a terminal, /help lists what can be typed beside messages. Without one, every line of standard input is a
    message, and the answers go to standard output.
    """
    generation_options(flags, {})  # wrong values are told before a model is loaded
    with opened_model(flags, registry) as opened:
        options = generation_options(flags, opened.text_format.defaults)
        with _conversation(opened, flags["system"]) as conversation:
            on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
            if on_terminal and not flags["as_json"]:
                from torchchat_core.cli.terminal_chat import TerminalChat

                TerminalChat(opened, conversation, options).run()
                return 0
            return _answer_lines(conversation, options, flags["as_json"])


@contextmanager
def _conversation(opened: OpenedModel, system: str | None) -> Iterator[Conversation]:
    from torchchat_core.conversation import Conversation
    from torchchat_core.generation import TokenSequence

    session = opened.model.session(opened.max_seq_length)
    try:
        yield Conversation(TokenSequence(session), opened.text_format, system)
    finally:
        session.close()


def _answer_lines(conversation: Conversation, options: GenerationOptions, as_json: bool) -> int:
    """Answers each line of standard input; an answer and an empty line, or a JSON object, for each."""
    from torchchat_core.cli.answers import answer_json
    from torchchat_core.cli.interrupt import interruptible
    from torchchat_core.generation import FinishedEvent, NoticeEvent, TextEvent

    for line in sys.stdin or ():
        message = line.strip()
        if not message:
            continue
        if message == "/bye":
            break
        finished: FinishedEvent | None = None
        with interruptible() as cancelled:
            for event in conversation.ask(message, options, cancelled=cancelled):
                if isinstance(event, NoticeEvent):
                    click.echo(f"notice: {event.text}", err=True)
                elif isinstance(event, FinishedEvent):
                    finished = event
                elif isinstance(event, TextEvent) and not as_json:
                    click.echo(event.text, nl=False)
        if as_json and finished is not None:
            click.echo(json.dumps(answer_json(finished), ensure_ascii=False))
        else:
            click.echo("\n")
        if finished is not None and finished.reason == "cancelled":
            return 130
    return 0
