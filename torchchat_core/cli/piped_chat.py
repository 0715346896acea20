"""Run the chat without a terminal: each line of standard input is a message or a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click

from torchchat_core.cli.answers import answer_json
from torchchat_core.cli.chat_commands import ChatCommands, Leave
from torchchat_core.cli.chat_input import is_block, parse_command, read_messages, without_quotes
from torchchat_core.cli.chat_session import ChatSession
from torchchat_core.cli.interrupt import interruptible
from torchchat_core.generation import FinishedEvent, NoticeEvent, TextEvent


class PipedChat:
    """Read messages and commands from standard input. Answers go to standard output, all else to standard error."""

    def __init__(self, session: ChatSession, as_json: bool) -> None:
        self._session = session
        self._as_json = as_json
        self._commands = ChatCommands(session, self)
        self._interrupted = False

    def run(self) -> int:
        """Answer until the input ends, and return the exit status. An error ends the chat."""
        for text in read_messages(sys.stdin.buffer if sys.stdin is not None else ()):
            command = None if is_block(text) else parse_command(text)
            try:
                if command is not None:
                    self._commands.run(*command)
                elif message := without_quotes(text):
                    self.answer(message)
            except Leave:
                break
            if self._interrupted:
                return 130
        return 0

    def line(self, text: str) -> None:
        click.echo(text, err=True)

    def table(self, rows: Sequence[tuple[str, ...]]) -> None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            self.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def answer(self, message: str, retry: int = 0) -> None:
        finished: FinishedEvent | None = None
        with interruptible() as cancelled:
            for event in self._session.ask(message, cancelled, retry):
                if isinstance(event, NoticeEvent):
                    click.echo(f"notice: {event.text}", err=True)
                elif isinstance(event, FinishedEvent):
                    finished = event
                elif isinstance(event, TextEvent) and not self._as_json:
                    click.echo(event.text, nl=False)
        if self._as_json and finished is not None:
            click.echo(json.dumps(answer_json(finished), ensure_ascii=False))
        else:
            click.echo("\n")
        self._interrupted = finished is not None and finished.reason == "cancelled"
