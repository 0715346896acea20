"""The conversation on a terminal: prompt_toolkit reads, rich writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchchat_core.cli.answers import printable, statistics_line, statistics_table
from torchchat_core.cli.interrupt import interruptible
from torchchat_core.cli.markdown_stream import MarkdownStream
from torchchat_core.conversation import Conversation
from torchchat_core.errors import TorchchatError, did_you_mean
from torchchat_core.generation import FinishedEvent, NoticeEvent, Statistics, TextEvent
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.options import detail_of, from_text
from torchchat_core.pipeline import OpenedModel
from torchchat_core.small_files import expanded

HELP = {
    "/help": "this list",
    "/system [TEXT]": "show the system message, or set it; /system - takes it away",
    "/reset": "forget the conversation, keep the system message",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a saved conversation",
    "/set [NAME VALUE]": "show the sampling options, or change one: /set temperature 0.2",
    "/stats": "the figures of the last answer",
    "/bye": "leave",
}
KEYS = "Enter sends, Alt-Enter begins a new line, Ctrl-C ends an answer, Ctrl-D leaves."


class Leave(Exception):
    """The user wants to go."""


class TerminalChat:
    """Reads messages and commands until the user leaves."""

    def __init__(self, opened: OpenedModel, conversation: Conversation, options: GenerationOptions,
                 console: Console | None = None) -> None:
        self._opened = opened
        self._conversation = conversation
        self._options = options
        self._console = console or Console()
        self._last: Statistics | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/system": self._system, "/reset": self._reset, "/save": self._save,
            "/load": self._load, "/set": self._set, "/stats": self._stats, "/bye": self._bye,
        }

    def run(self) -> None:
        """The conversation, until /bye or the end of input."""
        opened = self._opened
        self._console.print(f"[bold]{escape(opened.name)}[/bold] on {opened.model.device}, {opened.model.dtype}, "
                            f"{opened.executor.name}. /help lists what can be typed beside messages.", highlight=False)
        if opened.text_format.template is None:
            self._console.print("This model has no chat template: it is given a plain transcript.", style="yellow")
        reader: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=_keys(), multiline=True,
            completer=WordCompleter(list(self._commands), sentence=True), complete_while_typing=False,
            bottom_toolbar=self._status, prompt_continuation="  ",
        )
        while True:
            try:
                self.take(reader.prompt(HTML("<b>&gt; </b>")).strip())
            except KeyboardInterrupt:
                continue  # empties the line, as shells do
            except (EOFError, Leave):
                return

    def take(self, line: str) -> None:
        """One message or command; raises `Leave` for /bye. Errors are shown, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        except TorchchatError as error:
            self._console.print(f"error: {error.message}", style="red", markup=False)
            if error.fix:
                self._console.print(f"try: {error.fix}", markup=False)
        except (Leave, KeyboardInterrupt):
            raise
        except Exception as error:  # a fault of ours or of a plugin must not cost the user the conversation
            self._console.print(f"error: {type(error).__name__}: {error}", style="red", markup=False)

    def _answer(self, message: str) -> None:
        finished: FinishedEvent | None = None
        with interruptible() as cancelled, MarkdownStream(self._console) as output:
            for event in self._conversation.ask(message, self._options, cancelled=cancelled):
                if isinstance(event, TextEvent):
                    output.write(printable(event.text))
                elif isinstance(event, NoticeEvent):
                    self._console.print(event.text, style="yellow", markup=False)
                elif isinstance(event, FinishedEvent):
                    finished = event
        if finished is not None:
            self._last = finished.statistics
            ending = {"cancelled": " · interrupted", "length": " · cut at the limit"}.get(finished.reason, "")
            self._console.print(statistics_line(finished.statistics) + ending, style="dim", highlight=False)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        action = self._commands.get(name)
        if action is None:
            raise TorchchatError(f"there is no command {name!r}", did_you_mean(name, self._commands) or "/help")
        action(rest.strip())

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, meaning in HELP.items():
            table.add_row(name, meaning, style=None)
        self._console.print(table, markup=False)
        self._console.print(KEYS, highlight=False)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        self._console.print(self._conversation.system or "There is no system message.", markup=False)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._console.print("The conversation is empty.")

    def _save(self, file: str) -> None:
        self._conversation.save(_path(file, "/save"))
        self._console.print(f"{len(self._conversation.messages)} messages written to {file}.", markup=False)

    def _load(self, file: str) -> None:
        self._conversation.load(_path(file, "/load"))
        self._console.print(f"{len(self._conversation.messages)} messages read from {file}.", markup=False)

    def _set(self, text: str) -> None:
        sampling = self._options.sampling
        if text:
            name, _, value = text.partition(" ")
            changed = from_text(SamplingOptions, name, value.strip())
            sampling = replace(sampling, **{name.replace("-", "_"): changed})
            self._options = replace(self._options, sampling=sampling)
        table = Table.grid(padding=(0, 2))
        for field in (each for each in fields(SamplingOptions) if each.name != "logit_bias"):
            table.add_row(field.name, str(getattr(sampling, field.name)), detail_of(field).help)
        self._console.print(table, markup=False)

    def _stats(self, _: str) -> None:
        if self._last is None:
            self._console.print("There is no answer yet.")
            return
        table = Table.grid(padding=(0, 2))
        for name, value in statistics_table(self._last):
            table.add_row(name, value)
        self._console.print(table)

    def _bye(self, _: str) -> None:
        raise Leave

    def _status(self) -> str:
        parts: list[str] = []
        if self._last is not None:
            if self._last.decode_tps is not None:
                parts.append(f"{self._last.decode_tps:.1f} tokens/s")
            used = self._last.prompt_tokens + self._last.new_tokens
            parts.append(f"{used} of {self._opened.max_seq_length} tokens")
        return " " + " · ".join([*parts, self._opened.executor.name, self._opened.model.dtype, self._opened.name])


def _path(text: str, command: str) -> Path:
    if not text:
        raise TorchchatError(f"{command} needs a file", f"{command} conversation.json")
    return expanded(text)


def _keys() -> KeyBindings:
    """Enter sends and Alt-Enter begins a new line; without these, it is the other way round in multi-line input."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was typed in earlier conversations, in the user's state folder; in memory where it cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "torchchat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
        with (folder / "history").open("ab"):
            return FileHistory(folder / "history")
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return InMemoryHistory()
