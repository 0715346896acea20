"""Complete command names in the chat, and the files, models and options after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from torchchat_core.cli.chat_commands import OVERWRITE, Command, sampling_options


class ChatCompleter(Completer):
    """Complete a line that starts with a slash. `models` is called when a model name is first completed."""

    def __init__(self, commands: Sequence[Command], models: Callable[[], list[str]]) -> None:
        self._commands = commands
        self._models = models
        self._names: list[str] | None = None
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, space, argument = line.partition(" ")
        if not space:
            yield from self._command_names(name)
            return
        command = next((each for each in self._commands if name in each.names), None)
        if command is None:
            return
        if command.completes == "file":
            argument = argument.removeprefix(f"{OVERWRITE} ") if OVERWRITE in command.argument else argument
            yield from self._files.get_completions(Document(argument.lstrip()), complete_event)
        elif command.completes == "model":
            yield from _matching(self._model_names(), argument)
            yield from self._files.get_completions(Document(argument), complete_event)
        elif command.completes == "option" and " " not in argument:
            yield from (Completion(option, -len(argument), display_meta=detail.help)
                        for option, detail in sampling_options() if option.startswith(argument.replace("-", "_")))

    def _command_names(self, typed: str) -> Iterator[Completion]:
        for command in self._commands:
            for name in command.names:
                if name.startswith(typed):
                    yield Completion(name, -len(typed), display_meta=command.help)

    def _model_names(self) -> list[str]:
        if self._names is None:
            self._names = self._models()
        return self._names


def _matching(names: Iterable[str], typed: str) -> Iterator[Completion]:
    return (Completion(name, -len(typed)) for name in names if name.startswith(typed))
