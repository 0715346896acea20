"""What is asked of a backend, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.figures import Details


@dataclass(frozen=True, kw_only=True)
class Said:
    """One message of a conversation."""

    role: str  # "user" or "assistant"
    content: str


def in_turns(messages: Sequence[Said]) -> list[dict[str, Any]]:
    """As templates and servers take them. Of a question that got no answer and the next one, one message is made: many
    templates refuse two of a person in a row."""
    found: list[dict[str, Any]] = []
    for each in messages:
        if found and found[-1]["role"] == each.role:
            found[-1]["content"] += f"\n\n{each.content}"
        else:
            found.append({"role": each.role, "content": each.content})
    return found


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation whose last message is to be answered."""

    messages: Sequence[Said]
    configuration: Configuration
    asker: str = ""  # so that nobody's answers wait for all of another one's


@dataclass(frozen=True)
class Status:
    """What is done before the first word: "loading stories15M"; a share of 1 where it is known."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Text:
    """More of the answer `index`."""

    index: int
    text: str
    tokens: int = 1  # that it was made of, or one where nobody knows


@dataclass(frozen=True)
class Ended:
    """The answer `index` is complete."""

    index: int
    details: Details


Event = Status | Text | Ended
Report = Callable[[Event], None]


class Backend(Protocol):
    """Answers questions. `answer` runs on the loop of `turns`, and is cancelled where nobody wants the answer any more.
    """

    remote: bool  # a server elsewhere, which chooses executor and recipe itself

    def answer(self, question: Question, report: Report) -> Coroutine[Any, Any, None]:
        """Reports everything as it comes, an `Ended` for each answer last. Raises `TorchchatError` where it fails."""

    async def close(self) -> None: ...
