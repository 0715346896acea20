"""A conversation: messages, the prompt that they make, and the cache that is kept from turn to turn."""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.generation import (
    Event,
    FinishedEvent,
    NoticeEvent,
    TextEvent,
    TokenSequence,
    check_prompt,
    generate,
)
from torchchat_core.generation_options import GenerationOptions
from torchchat_core.small_files import read_text, write_whole
from torchchat_core.specs import Tokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.stream import TextStream
from torchchat_core.tokenizers.words import Words

ROLES = ("system", "user", "assistant")
MARK = "\ue0ff"  # of the private use area; it and a number stand for the text of a control token in a message
FIRST_NUMBER = 0xF0000  # of the supplementary private use area
TRANSCRIPT_STOP = "\nUser:"

Message = dict[str, Any]


class Conversation:
    """Messages between a user and a model, with at most one system message before them.

    A model without a chat template is given a plain transcript ("User: ... Assistant: ...").
    """

    def __init__(self, sequence: TokenSequence, text_format: TextFormat, system: str | None = None) -> None:
        self.messages: list[Message] = []
        self._sequence = sequence
        self._format = text_format
        self._settled: tuple[str, list[int]] = ("", [])  # text and ids up to the end of the last answer
        self._ends: list[tuple[int, int]] = []  # length of the text and of the ids at the end of each settled answer
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message, or None."""
        first = self.messages[0] if self.messages else None
        return str(first["content"]) if first and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        without = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + without

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def undo(self) -> str | None:
        """Remove the last user message and everything after it. Returns its text, or None if there is none.

        The next prompt reuses the cache of the remaining messages; the cache is truncated then.
        """
        last = next((index for index in reversed(range(len(self.messages)))
                     if self.messages[index]["role"] == "user"), None)
        if last is None:
            return None
        text = str(self.messages[last]["content"])
        self.messages = self.messages[:last]
        return text

    def prompt_length(self) -> int:
        """Return the number of tokens of the conversation; 0 if it has only a system message.

        Raises `TorchchatError` if the chat template rejects the conversation.
        """
        if all(message["role"] == "system" for message in self.messages):
            return 0
        return len(self._prompt(self.messages)[1])

    def ask(self, text: str, options: GenerationOptions, *, stream: int = 0,
            cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Adds the user's message and yields the events of the answer, which is added when it is complete.

        Where the context is full, the oldest turns are dropped, and a `NoticeEvent` says so. Raises
        `TorchchatError` where the message alone is too long; the conversation is then as it was before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            prompt_text, prompt, dropped = self._fitting_prompt(options)
        except TorchchatError:
            self.messages = before
            raise
        if dropped:
            yield NoticeEvent(text=f"the context of {self._sequence.limit} tokens is full: the oldest {dropped} "
                                   "messages were left out")
        if self._format.template is None:
            options = with_stop(options, TRANSCRIPT_STOP)
        answer: list[str] = []
        ids: Sequence[int] = ()
        finished = False
        try:
            for event in generate(self._sequence, prompt, self._format, options, stream=stream,
                                  cancelled=cancelled):
                if isinstance(event, TextEvent):
                    answer.append(event.text)
                elif isinstance(event, FinishedEvent):
                    ids = event.token_ids
                    finished = event.reason != "cancelled"
                yield event
        finally:  # also where the reader went away: what was said stays said
            content = "".join(answer)
            if content or finished:
                self.messages.append({"role": "assistant", "content": content})
            else:  # it failed, or was interrupted before the first word: as if it had not been asked
                self.messages = before
            if ids and text_of(ids, self._format.tokenizer) == content:  # not so where a stop string was cut off
                self._settle(prompt_text + content, [*prompt, *ids])

    def save(self, path: Path) -> None:
        """Writes the messages as JSON, whole or not at all. Raises `TorchchatError` where that fails."""
        write_whole(path, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: Path) -> None:
        """Replaces the messages by those of a file that `save` wrote. Raises `TorchchatError` where it is none."""
        text = read_text(path)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise TorchchatError(f"{quoted_path(str(path))} is no conversation: it is not JSON") from None
        self.messages = checked_messages(found.get("messages") if isinstance(found, dict) else found)

    def _fitting_prompt(self, options: GenerationOptions) -> tuple[str, list[int], int]:
        """The prompt as text and ids, and how many of the oldest messages had to go to make room."""
        before = len(self.messages)
        self.messages, text, ids = fitting_prompt(self.messages, self._sequence.limit, options, self._prompt)
        return text, ids, before - len(self.messages)

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """What is held of the last turn is taken as it was generated, and only what follows is encoded.

        Encoding the whole text again could cut the answer into other tokens than the model chose, and the cache
        would be of no use from there on.
        """
        text, encode = render(self._format, messages)
        settled_text, settled_ids = self._settled
        for text_end, ids_end in reversed(self._ends):  # an earlier end applies after the last turns were removed
            rest = text[text_end:]
            if (text.startswith(settled_text[:text_end]) and MARK not in rest
                    and starts_with_control_token(rest, self._format.tokenizer)):
                return text, [*settled_ids[:ids_end], *encode(rest)]
        return text, encode(text)

    def _settle(self, text: str, ids: list[int]) -> None:
        """Record the text and ids up to the end of an answer, and drop recorded ends that are not a prefix of them."""
        old_text, old_ids = self._settled
        while self._ends:  # the ends are ordered by length
            text_end, ids_end = self._ends[-1]
            if text.startswith(old_text[:text_end]) and ids[:ids_end] == old_ids[:ids_end]:
                break
            self._ends.pop()
        self._settled = (text, ids)
        self._ends.append((len(text), len(ids)))


def fitting_prompt(messages: Sequence[Message], limit: int, options: GenerationOptions,
                   prompt: Callable[[Sequence[Message]], tuple[str, list[int]]]
                   ) -> tuple[list[Message], str, list[int]]:
    """The messages that fit into `limit` tokens with an answer, and the text and ids that `prompt` makes of them.

    When the context is full, so many of the oldest turns go that half of it is free: what is left is computed anew, and
    that should not happen on every turn. Raises `TorchchatError` where the last message alone is too long.
    """
    room = min(options.max_new_tokens or limit, limit // 4)
    text, ids = prompt(messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(ids) + room <= limit or len(turns) < 2:
        check_prompt(ids, limit)
        return list(messages), text, ids

    def without(dropped_turns: int) -> list[Message]:
        return [*messages[: turns[0]], *messages[turns[dropped_turns] :]]

    dropped = bisect.bisect_left(range(len(turns) - 1), -(limit // 2), lo=1,  # rises with the turns that are dropped
                                 key=lambda dropped_turns: -len(prompt(without(dropped_turns))[1]))
    text, ids = prompt(without(dropped))
    check_prompt(ids, limit)
    return without(dropped), text, ids


def checked_messages(found: object) -> list[Message]:
    """Messages from a stranger's JSON. Raises `TorchchatError` where they are not such."""
    if not isinstance(found, list):
        raise TorchchatError("a conversation is a list of messages")
    for index, message in enumerate(found):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise TorchchatError(f"message {index} has no role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise TorchchatError(f"message {index} has no text as its content")
        if message["role"] == "system" and index:
            raise TorchchatError(f"message {index} is a system message; only the first one can be")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def render(text_format: TextFormat, messages: Sequence[Message], tools: Sequence[Message] | None = None,
           variables: Mapping[str, Any] | None = None) -> tuple[str, Callable[[str], list[int]]]:
    """The prompt's text, and the function that encodes it or an end of it. `variables` are the template's own.

    Control tokens come from the template alone: such a text inside a message or tool is encoded as ordinary text.
    Raises `TorchchatError` as `ChatTemplate.render` does; `tools` and `variables` need a template.
    """
    tokenizer = text_format.tokenizer
    if text_format.template is None:
        return transcript(messages), lambda text: encode_plain(text, tokenizer)
    text = text_format.template.render([_disarmed(message, tokenizer) for message in messages],
                                       tools=None if tools is None else [_disarmed(tool, tokenizer) for tool in tools],
                                       add_generation_prompt=True, variables=_disarmed(variables or {}, tokenizer))
    return text, lambda part: encode_disarmed(part, tokenizer)


def text_of(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """The text that tokens add to a text before them."""
    stream = TextStream(tokenizer, at_start=False)
    return stream.push_all(ids) + stream.finish()


def encode_plain(text: str, tokenizer: Tokenizer, *, special: bool = False) -> list[int]:
    """Ids of text that is no chat: with BOS where the tokenizer has it so.

    With `special`, control-token texts are such: for a prompt that its author has put together by hand.
    """
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [*start, *tokenizer.encode(text, special=special)]


def encode_disarmed(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a rendered template: the control tokens that stand in it, and no others.

    If a message contains the text of a control token, or normalization creates one that the template did not write,
    the tokenizer receives control tokens as ids and everything else as ordinary text.
    """
    parts = [part for part, _ in _control_tokens(tokenizer).parts(text)]
    if MARK not in text:
        ids = tokenizer.encode(text, special=True)
        control_ids = set(tokenizer.special_tokens.values())
        expected = [tokenizer.special_tokens[part] for part in parts if part in tokenizer.special_tokens]
        if [token for token in ids if token in control_ids] == expected:
            return ids
    return _encode_parts([tokenizer.special_tokens[part] if part in tokenizer.special_tokens
                          else _armed(part, tokenizer) for part in parts if part], tokenizer)


def _encode_parts(parts: Sequence[str | int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of `parts`: ordinary text, and control tokens given as ids."""
    encode = getattr(tokenizer, "encode_parts", None)  # optional for plugins' tokenizers
    if encode is not None:
        return list(encode(parts))
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids


def transcript(messages: Iterable[Mapping[str, str]]) -> str:
    """A conversation for a model that knows no chat template."""
    names = {"user": "User", "assistant": "Assistant"}
    lines = [f"{names[message['role']]}: {message['content'].strip()}" if message["role"] in names
             else message["content"].strip() for message in messages]
    return "\n".join([*lines, "Assistant:"])


def starts_with_control_token(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text can be encoded apart from what stands before it."""
    return _control_tokens(tokenizer).starts(text)


def _control_tokens(tokenizer: Tokenizer) -> Words:
    return _words(tuple(tokenizer.special_tokens))


@functools.lru_cache(maxsize=8)
def _words(words: tuple[str, ...]) -> Words:
    return Words(words)


def _disarmed(value: Any, tokenizer: Tokenizer) -> Any:
    """A message with a mark and a number in place of every control token's text in it."""
    if isinstance(value, Mapping):
        return {key: inner if key == "role" else _disarmed(inner, tokenizer) for key, inner in value.items()}
    if isinstance(value, list):
        return [_disarmed(inner, tokenizer) for inner in value]
    if not isinstance(value, str) or not tokenizer.special_tokens:
        return value
    numbers = {name: FIRST_NUMBER + index for index, name in enumerate(tokenizer.special_tokens)}
    return _control_tokens(tokenizer).replace(value.replace(MARK, ""), lambda name: MARK + chr(numbers[name]))


def _armed(text: str, tokenizer: Tokenizer) -> str:
    """The text of a message again, from a part of a rendered template."""
    names = list(tokenizer.special_tokens)
    return re.sub(f"{MARK}(.)", lambda found: names[ord(found[1]) - FIRST_NUMBER], text)


def with_stop(options: GenerationOptions, stop: str) -> GenerationOptions:
    """The options with one more stop string."""
    return replace(options, stop=(*options.stop, stop))
