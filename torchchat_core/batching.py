"""Many answers at once over one model: continuous batching.

`Batch.step` computes a share of the prompts that wait, then one token for every answer in progress: in one step of
the model where the executor has the ability `batch`, else one after the other. Answers come and go between steps.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.generation import (
    PREFILL_CHUNK,
    Answer,
    Clock,
    Event,
    TokenSequence,
    Told,
    check_prompt,
    decode_together,
    prefill_together,
)
from torchchat_core.generation_options import GenerationOptions
from torchchat_core.sequence_pool import WORTH_COPYING, SequencePool
from torchchat_core.specs import BatchedModel, ExecutorInfo, LoadedModel, PromptBatchingModel
from torchchat_core.text_format import TextFormat


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer that is wanted. `cancelled` may be set by any thread; everything else belongs to the batch."""

    prompt: Sequence[int]
    options: GenerationOptions
    at_start: bool = False  # as of `generation.generate`
    stream: int = 0
    client: str = ""  # whose it is: those with fewer answers in progress go first
    deadline: float = float("inf")  # by time.monotonic()
    told: Told = "tokens"  # as of `generation.Answer`
    cancelled: bool = False
    answer: Answer | None = field(default=None, init=False)
    sequence: TokenSequence | None = field(default=None, init=False)
    reused: int = field(default=0, init=False)  # tokens of the prompt that were in a cache
    done: int = field(default=0, init=False)  # tokens of the prompt that are in the sequence
    clock: Clock | None = field(default=None, init=False)


@dataclass(frozen=True)
class Failure:
    """The end of an answer that could not be made. `late`: because its time was over."""

    error: TorchchatError
    late: bool = False


Outcome = tuple[Job, Event | Failure]


class Batch:
    """The answers in progress, and those that wait. Not thread-safe: `step` and `add` belong to one thread."""

    def __init__(self, model: LoadedModel, text_format: TextFormat, executor: ExecutorInfo, *, limit: int, width: int,
                 kept_tokens: int) -> None:
        """`limit`: tokens of a sequence; `width`: answers at once; `kept_tokens`: as of `SequencePool`."""
        self.width = width
        self.steps = 0  # of decoding
        self.decoded = 0  # tokens, in all steps together
        self.pool = SequencePool(model, limit=limit, kept_tokens=kept_tokens, forks="fork" in executor.abilities)
        self._model, self._text_format, self._limit = model, text_format, limit
        self._batched = "batch" in executor.abilities
        self._prompts_batched = "prompt_batch" in executor.abilities
        self._waiting: list[Job] = []
        self._prefilling: Job | None = None  # a prompt that is computed in parts
        self._short: list[Job] = []  # prompts that are computed together, in this step
        self._decoding: list[Job] = []
        self._outcomes: list[Outcome] = []  # of steps, until they are asked for

    @property
    def active(self) -> int:
        """Answers in progress."""
        return len(self._decoding) + len(self._short) + (self._prefilling is not None)

    @property
    def waiting(self) -> int:
        """Answers that wait for a place."""
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Has an answer made. Raises `TorchchatError` for a prompt without tokens, or one that leaves no room."""
        check_prompt(job.prompt, self._limit)
        job.clock = Clock(len(job.prompt))
        self._waiting.append(job)

    def step(self) -> list[Outcome]:
        """Computes one step; what came of it, in the order in which it came.

        After a fault of its own, `drain` gives what had come before it.
        """
        self._dismiss()
        self._prefill()
        self._decode()
        return self.drain()

    def drain(self) -> list[Outcome]:
        """What came of steps that nobody was given yet."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def fail_all(self, error: TorchchatError) -> list[Outcome]:
        """Ends every answer with an error, after a fault whose extent is unknown; what came before it stands first."""
        for job in self._jobs():
            self._fail(job, error)
        return self.drain()

    def close(self) -> None:
        """Gives the memory of all sequences back. Answers in progress are forgotten."""
        self.pool.close()
        self._waiting, self._prefilling, self._short, self._decoding = [], None, [], []

    # ---- those that go ---------------------------------------------------------------------------------------------

    def _dismiss(self) -> None:
        """Lets go of answers that nobody wants any more, and of those whose time is over."""
        now = time.monotonic()
        for job in self._jobs():
            if job.cancelled:
                self._release(job)
            elif job.deadline < now:
                self._fail(job, TorchchatError("the time for the answer is over"), late=True)

    def _jobs(self) -> list[Job]:
        return [*self._waiting, *([self._prefilling] if self._prefilling else []), *self._short, *self._decoding]

    def _release(self, job: Job, broken: bool = False) -> None:
        """Takes a job out, and its sequence back."""
        self._waiting = [each for each in self._waiting if each is not job]
        self._short = [each for each in self._short if each is not job]
        self._decoding = [each for each in self._decoding if each is not job]
        if self._prefilling is job:
            self._prefilling = None
        if job.sequence is not None:
            (self.pool.drop if broken else self.pool.give)(job.sequence)
            job.sequence = None

    def _fail(self, job: Job, error: Exception, late: bool = False) -> None:
        """Ends one answer: a fault in it, such as a failed allocation, is no reason to end the others."""
        known = error if isinstance(error, TorchchatError) else TorchchatError(f"{type(error).__name__}: {error}")
        self._outcomes.append((job, Failure(known, late)))
        self._release(job, broken=not late)

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Computes at most `PREFILL_CHUNK` tokens of prompts, so that answers in progress do not wait for long.

        What else waits has no part in how a prompt is cut, and so none in how its numbers are rounded.
        """
        budget = PREFILL_CHUNK
        while budget > 0:
            job = self._prefilling or self._next()
            if job is None:
                break
            self._prefilling = job
            try:
                if job.sequence is None:
                    self._begin(job)
                chunk = job.prompt[job.done : job.done + PREFILL_CHUNK]
                if len(chunk) > budget:  # a step of its own
                    break
                budget -= len(chunk)
                if self._prompts_batched and len(chunk) <= WORTH_COPYING:  # nobody waits for what it has in common
                    self._prefilling = None
                    self._short.append(job)
                else:
                    self._prefill_one(job, chunk)
            except Exception as error:
                self._fail(job, error)
        self._prefill_short()

    def _prefill_short(self) -> None:
        """The prompts, or what is left of them, that take one call together."""
        jobs = list(self._short)
        chunks = [job.prompt[job.done :] for job in jobs]
        if len(jobs) > 1:
            try:
                logits = prefill_together(cast(PromptBatchingModel, self._model), _sequences(jobs), chunks)
            except Exception:  # of one of them: whose it is, is seen when they go one by one
                pass
            else:
                for job in jobs:
                    self._prefilled(job)
                self._choose(jobs, logits)
                return
        for job, chunk in zip(jobs, chunks, strict=True):
            try:
                self._prefill_one(job, chunk)
            except Exception as error:
                self._fail(job, error)

    def _prefill_one(self, job: Job, chunk: Sequence[int]) -> None:
        logits = cast(TokenSequence, job.sequence).prefill(chunk)
        job.done += len(chunk)
        if job.done == len(job.prompt):
            self._prefilled(job)
            self._take(job, logits)

    def _prefilled(self, job: Job) -> None:
        """The prompt is complete: the answer begins."""
        clock = cast(Clock, job.clock)
        clock.prefilled = clock.now()
        if self._prefilling is job:
            self._prefilling = None
        self._short = [each for each in self._short if each is not job]
        self._decoding.append(job)

    def _next(self) -> Job | None:
        """Of those that wait, the first one of a client with the fewest answers in progress."""
        if not self._waiting or self.active >= self.width:
            return None
        running = Counter(job.client for job in (*self._decoding, *self._short))
        chosen = min(self._waiting, key=lambda job: running[job.client])
        self._waiting.remove(chosen)
        return chosen

    def _begin(self, job: Job) -> None:
        job.clock = cast(Clock, job.clock)
        job.answer = Answer(job.prompt, self._text_format, job.options, job.clock, limit=self._limit,
                            at_start=job.at_start, stream=job.stream, told=job.told)
        job.sequence = self.pool.take(job.prompt)
        job.reused = job.done = job.clock.reused = job.sequence.reuse(job.prompt)

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """One token for each answer in progress."""
        jobs = list(self._decoding)
        if not jobs:
            return
        self.steps += 1
        self.decoded += len(jobs)
        if not self._batched or len(jobs) == 1:
            for job in jobs:
                self._decode_one(job)
            return
        try:
            logits = decode_together(cast(BatchedModel, self._model), _sequences(jobs),
                                     [_answer(job).token for job in jobs])
            self._choose(jobs, logits)
        except Exception as error:  # of the step itself: whose it is, cannot be told
            for job in self._decoding[:]:
                self._fail(job, error)

    def _decode_one(self, job: Job) -> None:
        try:
            self._take(job, cast(TokenSequence, job.sequence).decode(_answer(job).token))
        except Exception as error:
            self._fail(job, error)

    def _choose(self, jobs: list[Job], logits: Tensor) -> None:
        """What each of the answers makes of its row of logits [jobs, vocab]: the simple ones all at once."""
        rows = logits.numpy()
        best = rows.argmax(axis=1)  # numpy's: it takes no threads, for which a step of a small model would wait
        likeliest = best.tolist()
        finite = np.isfinite(rows[np.arange(len(jobs)), best]).tolist()
        for row, job in enumerate(jobs):
            answer = _answer(job)
            try:
                if finite[row] and answer.takes_the_likeliest:
                    self._note(job, answer, answer.take_token(likeliest[row]))
                else:
                    self._take(job, logits[row])
            except Exception as error:
                self._fail(job, error)

    def _take(self, job: Job, logits: Tensor) -> None:
        answer = _answer(job)
        self._note(job, answer, answer.take(logits))

    def _note(self, job: Job, answer: Answer, events: list[Event]) -> None:
        """What came of a token of an answer, which may be its end."""
        if answer.reason is not None:
            events += answer.finish()
        for event in events:
            self._outcomes.append((job, event))
        if answer.reason is not None:
            self._release(job)


def _sequences(jobs: Sequence[Job]) -> list[TokenSequence]:
    """Of jobs that were begun."""
    return [job.sequence for job in jobs]  # type: ignore[misc]


def _answer(job: Job) -> Answer:
    """Of a job that was begun."""
    return job.answer  # type: ignore[return-value]
