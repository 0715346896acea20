"""Implement the slash commands of the chat, shared by the terminal and piped input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

from torchchat_core.cli.answers import printable, statistics_table
from torchchat_core.cli.chat_input import without_quotes
from torchchat_core.cli.chat_session import ChatSession
from torchchat_core.cli.clipboard import copy_to_clipboard
from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.generation_options import SamplingOptions
from torchchat_core.options import OptionDetail, detail_of
from torchchat_core.small_files import expanded

OVERWRITE = "--overwrite"
NO_TEMPLATE = "This model has no chat template, so it receives a plain transcript."
SHOWN = 60  # characters shown of a removed message


class Leave(Exception):
    """Raised when the user wants to leave the chat."""


class Display(Protocol):
    """The interface that commands need from a frontend."""

    def line(self, text: str) -> None:
        """Show a line."""

    def table(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Show rows in aligned columns."""

    def answer(self, message: str, retry: int = 0) -> None:
        """Ask the model, and show its answer."""


@dataclass(frozen=True)
class Command:
    """One command. `run` receives the text after its name."""

    names: tuple[str, ...]  # the first is the preferred name; the others are aliases
    argument: str
    help: str
    run: Callable[[str], None]
    completes: Literal["file", "model", "option", "nothing"] = "nothing"


class ChatCommands:
    """The commands of one chat session."""

    def __init__(self, session: ChatSession, display: Display) -> None:
        self._session = session
        self._display = display
        self.all = (
            Command(("/help", "/?"), "", "list the commands", self._help),
            Command(("/retry",), "", "answer the last message again", self._retry),
            Command(("/undo",), "", "remove the last message and its answer", self._undo),
            Command(("/reset", "/clear"), "", "forget the conversation, keep the system message", self._reset),
            Command(("/system",), "[TEXT]", "show the system message, or set it; /system - removes it", self._system),
            Command(("/model",), "[NAME]", "show the model, or switch to another and keep the conversation",
                    self._model, "model"),
            Command(("/set",), "[NAME VALUE]", "show the sampling options, or change one: /set temperature 0.2",
                    self._set, "option"),
            Command(("/copy",), "", "copy the last answer to the clipboard", self._copy),
            Command(("/save",), f"[{OVERWRITE}] FILE", "write the conversation to a file", self._save, "file"),
            Command(("/load",), "FILE", "continue a saved conversation", self._load, "file"),
            Command(("/stats",), "", "show the figures of the last answer", self._stats),
            Command(("/bye", "/exit", "/quit"), "", "leave", self._leave),
        )

    def find(self, name: str) -> Command:
        """Return the command of that name. Raises `TorchchatError` if there is none."""
        for command in self.all:
            if name in command.names:
                return command
        names = [each for command in self.all for each in command.names]
        raise TorchchatError(f"there is no command {quoted(name)}", did_you_mean(name, names) or "/help")

    def run(self, name: str, argument: str) -> None:
        """Run a command. Raises `Leave` for /bye, and `TorchchatError` if the command fails."""
        command = self.find(name)
        if argument and not command.argument:
            raise TorchchatError(f"{name} takes no argument, but got {quoted(argument)}", name)
        command.run(argument)

    def _help(self, _: str) -> None:
        self._display.table([(f"{', '.join(command.names)} {command.argument}".strip(), command.help)
                             for command in self.all])
        self._display.line('Put a message of several lines between """ and """; it may start with a slash.')

    def _retry(self, _: str) -> None:
        session = self._session
        before, retry = session.conversation.messages, session.retries + 1
        message = self._removed()
        remaining = list(session.conversation.messages)
        if session.options.sampling.temperature == 0:
            self._display.line("The temperature is 0, so the answer will probably be the same; /set temperature 0.8 "
                               "varies it.")
        try:
            self._display.answer(message, retry)
        finally:
            if session.conversation.messages == remaining:  # no new answer: restore the old one
                session.conversation.messages = before
                session.changed()

    def _undo(self, _: str) -> None:
        message = " ".join(printable(self._removed()).split())
        shown = message if len(message) <= SHOWN else message[:SHOWN - 3] + "..."
        self._session.changed()
        self._display.line(f"Removed: {shown}")
        self._display.line(f"{_count(len(self._session.conversation.messages))} left.")

    def _removed(self) -> str:
        """Remove the last message and its answer. Raises `TorchchatError` if there is none."""
        message = self._session.conversation.undo()
        if message is None:
            raise TorchchatError("there is no message yet", "write one first")
        return message

    def _reset(self, _: str) -> None:
        self._session.conversation.reset()
        self._session.changed()
        self._display.line("The conversation is empty.")

    def _system(self, text: str) -> None:
        conversation = self._session.conversation
        if text:
            conversation.system = None if text == "-" else without_quotes(text)
            self._session.changed()
        self._display.line(conversation.system or "There is no system message.")

    def _model(self, name: str) -> None:
        session = self._session
        if not name:
            self._display.line(f"{session_line(session)} 'torchchat list' shows the models.")
            return
        session.switch(name)
        session.changed()
        self._display.line(session_line(session))
        if session.opened.text_format.template is None:
            self._display.line(NO_TEMPLATE)
        count = len(session.conversation.messages)
        if session.used is None:
            self._display.line("Its chat template rejects this conversation; /reset starts a new one.")
        elif count:
            self._display.line(f"The conversation is kept ({_count(count)}); the new model reads it before its next "
                               "answer.")

    def _set(self, text: str) -> None:
        if text:
            name, _, value = text.partition(" ")
            if not value.strip():
                raise TorchchatError(f"/set {quoted(name)} needs a value", f"/set {name} VALUE, or /set to show all")
            self._session.set_option(name, value.strip())
        sampling = self._session.options.sampling
        self._display.table([(name, str(getattr(sampling, name)), detail.help) for name, detail in sampling_options()])

    def _copy(self, _: str) -> None:
        messages = self._session.conversation.messages
        if not messages or messages[-1]["role"] != "assistant":
            raise TorchchatError("there is no answer to copy yet", "write a message first")
        self._display.line(copy_to_clipboard(printable(str(messages[-1]["content"])), sys.stdout))

    def _save(self, text: str) -> None:
        overwrite = text == OVERWRITE or text.startswith(f"{OVERWRITE} ")
        file = text.removeprefix(OVERWRITE).strip() if overwrite else text
        path = _path(file, "/save")
        if not overwrite and os.path.lexists(path):
            raise TorchchatError(f"{quoted(file)} already exists",
                                 f"choose another name, or /save {OVERWRITE} {file}")
        self._session.conversation.save(path)
        self._display.line(f"{_count(len(self._session.conversation.messages))} written to {file}.")

    def _load(self, file: str) -> None:
        self._session.conversation.load(_path(file, "/load"))
        self._session.changed()
        self._display.line(f"{_count(len(self._session.conversation.messages))} read from {file}.")

    def _stats(self, _: str) -> None:
        if self._session.last is None:
            self._display.line("There is no answer yet.")
        else:
            self._display.table(statistics_table(self._session.last))

    def _leave(self, _: str) -> None:
        raise Leave


def session_line(session: ChatSession) -> str:
    """Return a line such as "qwen3-0.6b on cpu, bf16, eager."."""
    opened = session.opened
    return f"{opened.name} on {opened.model.device}, {opened.model.dtype}, {opened.executor.name}."


def sampling_options() -> Iterator[tuple[str, OptionDetail]]:
    """Yield the names and details of the options that /set accepts."""
    for field in fields(SamplingOptions):
        if field.name != "logit_bias":
            yield field.name, detail_of(field)


def _count(messages: int) -> str:
    return f"{messages} message{'' if messages == 1 else 's'}"


def _path(text: str, command: str) -> Path:
    if not text:
        raise TorchchatError(f"{command} needs a file", f"{command} conversation.json")
    return expanded(text)
