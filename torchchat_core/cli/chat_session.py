"""Hold the model, the conversation and the options of one chat. Switching models keeps the conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchchat_core.cli.flags import PATHS, generation_options, model_request
from torchchat_core.cli.listing import in_order
from torchchat_core.cli.opening import opened_model
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.conversation import Conversation, Message
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import Event, FinishedEvent, Statistics, TokenSequence
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.options import from_text
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import take_inventory

if TYPE_CHECKING:
    from torchchat_core.pipeline import OpenedModel

# Flags that describe the first model's files. They do not apply after a switch to another model.
OWN_FLAGS = (*(path[2:].replace("-", "_") for path in PATHS), "params_path", "tokenizer_path", "adapter")


@dataclass(frozen=True)
class Models:
    """Access to models: `fetch` downloads one, `open` loads one, `names` lists the choices, local models first."""

    fetch: Callable[[Mapping[str, Any]], None]
    open: Callable[[Mapping[str, Any]], AbstractContextManager[tuple[OpenedModel, TokenSequence]]]
    names: Callable[[], list[str]]


def installed_models(registry: Registry) -> Models:
    """Return access to the models of all installed sources."""

    def fetch(flags: Mapping[str, Any]) -> None:
        from torchchat_core.pipeline import fetch_files

        with shown_progress():
            fetch_files(model_request(flags), registry)

    @contextmanager
    def open_(flags: Mapping[str, Any]) -> Iterator[tuple[OpenedModel, TokenSequence]]:
        with opened_model(flags, registry) as opened, ExitStack() as stack:
            session = opened.model.session(opened.max_seq_length)
            stack.callback(session.close)
            yield opened, TokenSequence(session)

    def names() -> list[str]:
        return [model.name for model in in_order(take_inventory(registry).models)]

    return Models(fetch, open_, names)


class ChatSession:
    """A conversation with a model. Use it as a context manager: the model is loaded on entry, released on exit."""

    opened: OpenedModel
    conversation: Conversation

    def __init__(self, flags: Mapping[str, Any], models: Models) -> None:
        self.models = models
        self.last: Statistics | None = None  # of the last answer; None if that was removed
        self.used: int | None = 0  # tokens of the conversation; None if unknown
        self.retries = 0  # of the last message
        self._flags = dict(flags)
        self._changed: dict[str, Any] = {}  # sampling options that the user set
        self._stack = ExitStack()

    def __enter__(self) -> ChatSession:
        self._open(self._flags, [])
        self.conversation.system = self._flags.get("system")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def options(self) -> GenerationOptions:
        """The model's defaults, overridden by the command line, then by /set."""
        options = generation_options(self._flags, self.opened.text_format.defaults)
        return replace(options, sampling=replace(options.sampling, **self._changed))

    def set_option(self, name: str, value: str) -> None:
        """Change one sampling option. Raises `TorchchatError` for an unknown name or a wrong value."""
        self._changed[name.replace("-", "_")] = from_text(SamplingOptions, name, value)

    def ask(self, message: str, cancelled: Callable[[], bool], retry: int = 0) -> Iterator[Event]:
        """Yield the events of the answer. With a seed, each `retry` number gives a different answer."""
        self.retries = retry
        answered = True
        for event in self.conversation.ask(message, self.options, stream=retry, cancelled=cancelled):
            if isinstance(event, FinishedEvent):
                self.last = event.statistics
                self.used = event.statistics.prompt_tokens + event.statistics.new_tokens
                answered = event.reason != "cancelled" or bool(event.text)
            yield event
        if not answered:  # the conversation dropped the message
            self.changed()

    def changed(self) -> None:
        """Recount the tokens of the conversation after its messages have changed."""
        self.last, self.retries = None, 0
        try:
            self.used = self.conversation.prompt_length()
        except TorchchatError:  # the template rejects it; the next message reports that
            self.used = None

    def switch(self, name: str) -> None:
        """Switch to another model and keep the messages.

        The new model is downloaded before the old one is released, and loaded afterwards, so that memory holds only one
        model. If loading fails, the old model is loaded again. Raises `TorchchatError` as `open_model` does.
        """
        flags = {**self._flags, **dict.fromkeys(OWN_FLAGS), "model": name}
        self.models.fetch(flags)
        self._stack.close()
        try:
            self._open(flags, self.conversation.messages)
        except BaseException:
            self._open(self._flags, self.conversation.messages)
            raise
        self._flags = flags

    def _open(self, flags: Mapping[str, Any], messages: list[Message]) -> None:
        """Load the model and start a conversation with the messages."""
        with ExitStack() as stack:
            self.opened, sequence = stack.enter_context(self.models.open(flags))
            self.conversation = Conversation(sequence, self.opened.text_format)
            self.conversation.messages = messages
            self._stack = stack.pop_all()
