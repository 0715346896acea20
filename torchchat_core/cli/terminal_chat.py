"""The conversation on a terminal: prompt_toolkit reads, rich writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchchat_core.cli.answers import printable, statistics_line
from torchchat_core.cli.chat_commands import NO_TEMPLATE, ChatCommands, Leave, session_line
from torchchat_core.cli.chat_completion import ChatCompleter
from torchchat_core.cli.chat_input import block_is_open, is_block, parse_command, without_quotes
from torchchat_core.cli.chat_session import ChatSession
from torchchat_core.cli.interrupt import interruptible, without_echo
from torchchat_core.cli.markdown_stream import MarkdownStream
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import FinishedEvent, NoticeEvent, TextEvent
from torchchat_core.models.catalogue import STARTING_MODEL
from torchchat_core.pipeline import DEFAULT_MODEL
from torchchat_core.small_files import make_private, xdg_folder

KEYS = "Enter sends, Alt-Enter starts a new line, Tab completes, Ctrl-C stops an answer, Ctrl-D leaves."
HOW_TO_LEAVE = "To leave, press Ctrl-D or type /bye."


class TerminalChat:
    """Reads messages and commands until the user leaves."""

    def __init__(self, session: ChatSession, console: Console | None = None) -> None:
        self._session = session
        self._console = console or Console()
        self._commands = ChatCommands(session, self)

    def run(self) -> None:
        """Talk until the user leaves or the input ends."""
        name = self._session.opened.name
        runs = session_line(self._session).removeprefix(name)
        self._console.print(f"[bold]{escape(name)}[/bold]{escape(runs)} /help lists the commands.", highlight=False)
        if self._session.opened.text_format.template is None:
            self._console.print(NO_TEMPLATE, style="yellow")
        if name == DEFAULT_MODEL:
            self.line(f"This is a small demo. For real answers: torchchat chat {STARTING_MODEL}, or another of "
                      "'torchchat list'.")
        reader: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=_keys(), multiline=True, complete_while_typing=False,
            completer=ChatCompleter(self._commands.all, self._session.models.names), bottom_toolbar=self.status,
            prompt_continuation="  ",
        )
        while True:
            try:
                line = reader.prompt(HTML("<b>&gt; </b>"))
            except KeyboardInterrupt:
                if not reader.default_buffer.text:  # otherwise Ctrl-C only cleared the line, as in shells
                    self.line(HOW_TO_LEAVE)
                continue
            except EOFError:
                return
            try:
                self.take(line)
            except KeyboardInterrupt:
                self.line("Interrupted.")
            except Leave:
                return

    def take(self, line: str) -> None:
        """Handle one message or command. Errors are shown, and the chat continues. Raises `Leave` for /bye."""
        try:
            command = None if is_block(line) else parse_command(line)
            if command is not None:
                self._commands.run(*command)
                if command[0] in ("/help", "/?"):
                    self._console.print(KEYS, highlight=False)
            elif message := without_quotes(line):
                self.answer(message)
        except TorchchatError as error:
            self._console.print(f"error: {error.message}", style="red", markup=False)
            if error.fix:
                self._console.print(f"try: {error.fix}", markup=False, highlight=False)
        except Leave:
            raise
        except Exception as error:  # a fault of ours or of a plugin must not cost the user the conversation
            self._console.print(f"error: {type(error).__name__}: {error}", style="red", markup=False)

    def line(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False)

    def table(self, rows: Sequence[tuple[str, ...]]) -> None:
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self._console.print(table)

    def answer(self, message: str, retry: int = 0) -> None:
        finished: FinishedEvent | None = None
        # Echoed keys (^C, text typed ahead) would move the text that is being redrawn.
        with without_echo(), interruptible() as cancelled, MarkdownStream(self._console) as output:
            for event in self._session.ask(message, cancelled, retry):
                if isinstance(event, TextEvent):
                    output.write(printable(event.text))
                elif isinstance(event, NoticeEvent):
                    self._console.print(event.text, style="yellow", markup=False)
                elif isinstance(event, FinishedEvent):
                    finished = event
        if finished is not None:
            ending = {"cancelled": " · interrupted", "length": " · cut at the limit"}.get(finished.reason, "")
            self._console.print(statistics_line(finished.statistics) + ending, style="dim", highlight=False)

    def status(self) -> str:
        """Return the status bar: the speed of the last answer, the tokens of the conversation, and the model."""
        session, opened = self._session, self._session.opened
        parts: list[str] = []
        if session.last is not None and session.last.decode_tps is not None:
            parts.append(f"{session.last.decode_tps:.1f} tokens/s")
        if session.used is not None:
            parts.append(f"{session.used} of {opened.max_seq_length} tokens")
        return " " + " · ".join([*parts, opened.executor.name, opened.model.dtype, opened.name])


def _keys() -> KeyBindings:
    """Bind Enter to send, or to start a new line in a block, and Alt-Enter to start a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if block_is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Return the input history: a file in the user's state folder, or memory if no file can be written."""
    try:
        folder = (xdg_folder("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "torchchat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
        make_private(folder / "history")
        with (folder / "history").open("ab"):
            return FileHistory(folder / "history")
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return InMemoryHistory()
