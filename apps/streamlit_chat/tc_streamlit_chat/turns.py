"""Answers in progress. They are made on a thread of their own, and go to their own conversation whatever becomes of
the page that asked: it may be drawn anew, or closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tc_streamlit_chat.figures import Details, Figures
from tc_streamlit_chat.questions import Backend, Event, Question, Status, Text
from torchchat_core.errors import TorchchatError

MOST_REMEMBERED = 1000  # turns that are done, for what went wrong in them
Result = TypeVar("Result")
Outcome = list[tuple[str, Details]]  # text and details of each answer


@dataclass
class Sample:
    """One answer as it comes."""

    text: str = ""
    tokens: int = 0
    first: float | None = None  # by time.perf_counter()
    last: float | None = None
    details: Details | None = None  # once it is complete

    def take(self, event: Text) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.text += event.text
        self.tokens += event.tokens

    def stopped(self, started: float) -> Details:
        """Of an answer that was not made to its end: what was seen of it."""
        if self.details is not None:
            return self.details
        span = (self.last or 0.0) - (self.first or 0.0)
        rate = (self.tokens - 1) / span if self.tokens > 1 and span > 0 else None
        return Details(reason="cancelled", figures=Figures(
            new_tokens=self.tokens, decode_tps=rate,
            ttft_s=self.first - started if self.first is not None else None))


class Turn:
    """The answers to one question. Written by the loop, read by pages."""

    def __init__(self, question: Question, finish: Callable[[Outcome], None] = lambda _: None) -> None:
        """`finish` is given what was said, once and on the loop's own threads, before `done` is set."""
        self.question = question
        self.done = threading.Event()
        self.error: TorchchatError | None = None
        self.started = time.perf_counter()
        self._finish = finish
        self._lock = threading.Lock()
        self._status = Status("waiting")
        self._samples = [Sample() for _ in range(question.configuration.num_samples)]
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def status(self) -> Status:
        return self._status

    @property
    def samples(self) -> list[Sample]:
        """Copies: what they are now."""
        with self._lock:
            return [replace(sample) for sample in self._samples]

    def stop(self) -> None:
        """Ends the answer; what was said stays said."""
        self._stopped = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    def report(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Status):
                self._status = event
            elif isinstance(event, Text):
                if 0 <= event.index < len(self._samples):
                    self._samples[event.index].take(event)
            elif 0 <= event.index < len(self._samples):
                self._samples[event.index].details = event.details

    async def run(self, backend: Backend) -> None:
        self._task = asyncio.ensure_future(backend.answer(self.question, self.report))
        if self._stopped:  # before it began
            self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            pass
        except TorchchatError as error:
            self.error = error
        except Exception as error:  # a fault of ours or of a plugin: the page tells it, and goes on
            self.error = TorchchatError(f"{type(error).__name__}: {error}")
        await self._kept()

    async def _kept(self) -> None:
        outcome = [(sample.text, sample.stopped(self.started)) for sample in self.samples]
        said = [each for each in outcome if each[0] or (each[1].reason != "cancelled" and self.error is None)]
        try:
            if said:
                await asyncio.to_thread(self._finish, said)
        except TorchchatError as error:
            self.error = self.error or error
        finally:
            self.done.set()


@dataclass
class Turns:
    """The thread on which answers are made, and those that are being made, by conversation."""

    backend: Backend
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop, init=False)
    _current: dict[str, Turn] = field(default_factory=dict, init=False)
    _waiting: dict[str, str] = field(default_factory=dict, init=False)  # messages for after a turn, by conversation
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._loop.run_forever, name="torchchat-answers", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Runs a coroutine of the backend on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def start(self, place: str, question: Question, finish: Callable[[Outcome], None] = lambda _: None) -> Turn:
        """Has a question answered at a place: a conversation, or one half of a comparison.

        Raises `TorchchatError` where an answer is being made there.
        """
        turn = Turn(question, finish)
        with self._lock:
            current = self._current.get(place)
            if current is not None and not current.done.is_set():
                raise TorchchatError("an answer is being written here", "stop it, or wait for its end")
            if len(self._current) >= MOST_REMEMBERED:
                self._current = {key: each for key, each in self._current.items() if not each.done.is_set()}
            self._current[place] = turn
        self.run(turn.run(self.backend))
        return turn

    def at(self, place: str) -> Turn | None:
        """The last turn there, which may be done."""
        return self._current.get(place)

    def keep_waiting(self, place: str, text: str) -> None:
        """Keeps a message that was written while an answer is, behind those that wait there already."""
        with self._lock:
            before = self._waiting.get(place)
            self._waiting[place] = text if before is None else f"{before}\n\n{text}"

    def waiting(self, place: str) -> str | None:
        """What waits there for the end of the answer."""
        return self._waiting.get(place)

    def take_waiting(self, place: str) -> str | None:
        """The same, which waits no more: of several tabs, one gets it."""
        with self._lock:
            return self._waiting.pop(place, None)

    def forget(self, place: str) -> None:
        """Ends the turn there; its error and text, and what waits for its end, are of no interest any more."""
        with self._lock:
            turn = self._current.pop(place, None)
            self._waiting.pop(place, None)
        if turn is not None:
            turn.stop()

    def close(self) -> None:
        """Ends all answers and gives the models' memory back."""
        for place in list(self._current):
            self.forget(place)
        self.run(self.backend.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
