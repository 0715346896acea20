"""One model on a thread of its own, and the way from requests to it and back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from torchchat_core.batching import Batch, Failure, Job, Outcome
from torchchat_core.constraints import GrammarError
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import PREFILL_CHUNK, Event, FinishedEvent, Told
from torchchat_core.pipeline import ModelRequest, OpenedModel, open_model
from torchchat_core.plugins import Registry
from torchchat_core.server.errors import ApiError, ClientGone
from torchchat_core.server.limits import Limits
from torchchat_core.server.metrics import Metrics
from torchchat_core.specs import LoadedModel

Result = TypeVar("Result")
WIDTH = {True: 64, False: 4}  # answers at once, with and without the ability `batch`


class Answers:
    """What comes of the jobs of one request: put here by the model's thread, read on the event loop."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], whole: bool) -> None:
        """`whole`: the reader waits for all of the answers, and need not be woken for each of their tokens."""
        self.jobs = list(jobs)
        self._whole = whole
        self._engine = engine
        self._places = {id(job): place for place, job in enumerate(jobs)}
        self._arrived: deque[tuple[int, Event | Failure]] = deque()
        self._waiter: asyncio.Future[None] | None = None  # of the reader
        self._open = len(self.jobs)  # answers that are not complete, as far as the reader may know
        self._broken = False
        self._left = False

    async def read(self) -> list[tuple[int, Event]]:
        """All events since the last call, each with the place of its job; empty when all answers are complete.

        Raises `ApiError` where an answer failed, `ClientGone` after `leave`.
        """
        while self._open and (self._whole or not self._arrived) and not self._broken and not self._left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._left:
            raise ClientGone
        events: list[tuple[int, Event]] = []
        while self._arrived:
            place, event = self._arrived.popleft()
            if isinstance(event, Failure):
                raise _told(event)
            events.append((place, event))
        return events

    def put(self, job: Job, event: Event | Failure) -> bool:
        """On the model's thread: one event more; whether the reader has to hear of it."""
        self._arrived.append((self._places[id(job)], event))
        return not self._whole or isinstance(event, FinishedEvent | Failure)

    def ended(self, failed: bool) -> None:
        """One of the answers is complete, or has failed."""
        self._open -= 1
        self._broken = self._broken or failed

    def wake(self) -> None:
        """Lets the reader look."""
        if not (self._whole and self._open) or self._broken:
            self._go_on()

    def leave(self) -> None:
        """The client has gone: the reader need not wait."""
        self._left = True
        self._go_on()

    def _go_on(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Frees the places of answers that nobody reads any more."""
        if self._open:
            self._engine.cancel(self.jobs)


def _first_of(prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """So many as a step computes, and one at least."""
    tokens = 0
    for count, prompt in enumerate(prompts):
        tokens += len(prompt)
        if count and tokens > PREFILL_CHUNK:
            return prompts[:count]
    return prompts


def _told(failure: Failure) -> ApiError:
    if failure.late:
        return ApiError(504, str(failure.error), code="timeout")
    return ApiError(400 if isinstance(failure.error, GrammarError) else 500, str(failure.error))


class Engine:
    """A model that is opened, run and closed by one thread."""

    def __init__(self, request: ModelRequest, registry: Registry, limits: Limits, metrics: Metrics) -> None:
        self.opened: OpenedModel
        self.width = 0
        self._request, self._registry, self._limits, self._metrics = request, registry, limits, metrics
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._condition = threading.Condition()
        self._new: list[Job] = []
        self._calls: deque[tuple[Callable[[LoadedModel], None], Future[Any]]] = deque()
        self._others = 0  # requests in `call_for_each`, and answers whose prompts are being prepared
        self._closing = False
        self._error: BaseException | None = None  # what ended the thread
        self._answers: dict[int, Answers] = {}  # id of a job -> where its events go
        self._news: deque[tuple[Iterable[Answers], Iterable[tuple[Job, bool]]]] = deque()  # for the event loop
        self._thread = threading.Thread(target=self._run, name="torchchat-model", daemon=True)
        self._thread.start()

    async def ready(self) -> None:
        """Returns when the model is open. Raises whatever kept it from that."""
        await asyncio.shield(self._ready)

    @property
    def broken(self) -> bool:
        """Whether a fault ended the thread; no answer comes from it any more."""
        return self._error is not None

    @property
    def in_progress(self) -> int:
        """Answers that are made or wait, and requests for other things of the model."""
        return len(self._answers) + self._others

    def check_room(self, count: int) -> None:
        """Raises `ApiError` 429 where so many answers more would be too many, 400 where they always are."""
        most = self.width + self._limits.max_queue
        if count > most:
            raise ApiError(400, f"{count} answers are asked for at once; at most {most} are possible",
                           code="invalid_value")
        if self.in_progress + count > most:
            raise ApiError(429, f"{self.in_progress} answers are in progress or wait; try again later",
                           code="queue_full")

    @contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Count `count` answers as waiting while their prompts are prepared in the block. Raises as `check_room`."""
        self.check_room(count)
        self._others += count
        try:
            yield
        finally:
            self._others -= count

    def submit(self, jobs: Sequence[Job], told: Told = "tokens") -> Answers:
        """Has answers made, for a reader who is told of so much.

        Raises `ApiError` 429 where too many wait, 503 where the model has failed.
        """
        self._check()
        self.check_room(len(jobs))
        answers = Answers(self, jobs, whole=told == "end")
        for job in jobs:
            job.deadline, job.told = time.monotonic() + self._limits.max_time, told
            self._answers[id(job)] = answers
        with self._condition:
            self._new += jobs
            self._condition.notify()
        return answers

    def cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.cancelled = True
            self._answers.pop(id(job), None)
        with self._condition:
            self._condition.notify()

    async def _call(self, function: Callable[[LoadedModel], Result]) -> Result:
        """Runs a function of the model between two steps, on the model's thread."""
        self._check()
        done: Future[Result] = Future()

        def run(model: LoadedModel) -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function(model))
                except BaseException as error:  # belongs to the one who waits
                    done.set_exception(error)

        with self._condition:
            self._calls.append((run, done))
            self._condition.notify()
        return await asyncio.wrap_future(done)

    async def call_for_each(self, function: Callable[[LoadedModel, Sequence[int]], Result],
                            prompts: Sequence[Sequence[int]]) -> list[Result]:
        """What a function of the model makes of each prompt. Between two steps as many are taken as a step computes.

        Raises `ApiError` 429 where too much waits already, 504 where there is no time for all.
        """
        self.check_room(1)
        found: list[Result] = []
        self._others += 1
        try:
            async with asyncio.timeout(self._limits.max_time):
                while len(found) < len(prompts):
                    some = _first_of(prompts[len(found) :])
                    found += await self._call(lambda model, some=some: [function(model, each) for each in some])  # type: ignore[misc]
        except TimeoutError:
            raise ApiError(504, "there was no time left for the model", code="timeout") from None
        finally:
            self._others -= 1
        return found

    def _check(self) -> None:
        if self._error is not None:
            raise ApiError(503, f"the model has failed: {self._error or type(self._error).__name__}; try again")

    async def close(self, patience: float | None = None) -> None:
        """Ends the thread after its step and gives the memory back; answers in progress are lost.

        Returns after `patience` seconds at the latest: the process ends, whatever the step is about.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join, patience)

    # ---- on the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with open_model(self._request, self._registry) as opened:
                self.opened = opened
                self.width = self._limits.parallel or WIDTH["batch" in opened.executor.abilities]
                batch = Batch(opened.model, opened.text_format, opened.executor, limit=opened.max_seq_length,
                              width=self.width, kept_tokens=self._limits.cache_tokens)
                self._tell(self._opened)
                try:
                    self._work(batch, opened.model)
                finally:
                    batch.close()
        except BaseException as error:
            failure = error
            self._tell(lambda: self._failed(failure))

    def _work(self, batch: Batch, model: LoadedModel) -> None:
        while self._wait(batch):
            with self._condition:
                jobs, self._new = self._new, []
                call = self._calls.popleft() if self._calls else None
            if call is not None:  # one, so that answers in progress go on
                call[0](model)
            outcomes = [outcome for job in jobs for outcome in self._added(batch, job)]
            try:
                outcomes += batch.step()
            except Exception as error:  # a fault of an executor must not leave everyone waiting
                outcomes += batch.fail_all(TorchchatError(f"{type(error).__name__}: {error}"))
            except BaseException:
                self._deliver([*outcomes, *batch.drain()])
                raise
            self._metrics.observe_batch(batch)
            self._deliver(outcomes)

    def _wait(self, batch: Batch) -> bool:
        """Until there is something to do; False where the thread is to end."""
        with self._condition:
            while not (self._new or self._calls or batch.active or batch.waiting or self._closing):
                self._condition.wait()
            return not self._closing

    def _added(self, batch: Batch, job: Job) -> list[Outcome]:
        try:
            batch.add(job)
        except Exception as error:
            known = error if isinstance(error, TorchchatError) else TorchchatError(f"{type(error).__name__}: {error}")
            return [(job, Failure(known))]
        return []

    def _tell(self, function: Callable[[], Any]) -> None:
        """Has a function called on the event loop, which may be closed already."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            self._closing = True

    def _opened(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)

    def _failed(self, error: BaseException) -> None:
        """The thread has ended: whoever waits for it hears why."""
        self._error = error
        if not self._ready.done():
            self._ready.set_exception(error)
        with self._condition:
            calls, self._calls = self._calls, deque()
        for _, done in calls:
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
        failure = Failure(TorchchatError(f"the model has failed: {type(error).__name__}: {error}"))
        self._deliver([(job, failure) for answers in set(self._answers.values()) for job in answers.jobs])

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Hands out what came of a step, and has the event loop called once for all whom it concerns."""
        touched: dict[Answers, None] = {}
        ended: list[tuple[Job, bool]] = []
        for job, event in outcomes:
            answers = self._answers.get(id(job))
            if answers is None:  # nobody wants it any more
                continue
            if isinstance(event, FinishedEvent | Failure):
                self._metrics.observe_answer(job, event)
                ended.append((job, isinstance(event, Failure)))
            if answers.put(job, event):
                touched[answers] = None
        if touched:
            self._news.append((touched, ended))
            if len(self._news) == 1:  # else the event loop has been called, and was not there yet
                self._tell(self._wake)

    def _wake(self) -> None:
        """On the event loop."""
        while self._news:
            touched, ended = self._news.popleft()
            for job, failed in ended:
                answers = self._answers.pop(id(job), None)
                if answers is not None:
                    answers.ended(failed)
            for answers in touched:
                answers.wake()
