"""Models in this process: each is loaded once, whoever asks, and answers are made together where the executor can."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from tc_streamlit_chat.figures import Details, Figures
from tc_streamlit_chat.questions import Ended, Question, Report, Status, Text, in_turns
from torchchat_core.batching import Job
from torchchat_core.conversation import TRANSCRIPT_STOP, encode_plain, fitting_prompt, render, with_stop
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import FinishedEvent, TextEvent, TokenEvent, check_prompt
from torchchat_core.generation_options import GenerationOptions
from torchchat_core.pipeline import ModelRequest, OpenedModel, fetch_files
from torchchat_core.plugins import Registry
from torchchat_core.progress import Unit, shown_by
from torchchat_core.server.engine import Engine
from torchchat_core.server.errors import ApiError
from torchchat_core.server.limits import Limits
from torchchat_core.server.metrics import Metrics
from torchchat_core.server.shelf import Shelf

DAY = 86400.0  # seconds: an answer takes as long as it takes, there is a stop button


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a model once it is loaded."""

    name: str
    executor: str
    device: str
    dtype: str
    schemes: tuple[str, ...]
    limit: int  # tokens of a conversation
    chats: bool  # whether it has a chat template
    defaults: dict[str, float | int]  # of sampling, as its makers recommend

    @property
    def line(self) -> str:
        return ", ".join([self.executor, self.device, self.dtype, *self.schemes])


class LocalModels:
    """A backend. `answer`, `load` and `close` belong to one event loop; `known` may be asked from any thread."""

    remote = False

    def __init__(self, base: ModelRequest, registry: Registry, *, max_loaded: int, memory_limit: int) -> None:
        """`base`: what the command line asked for; `max_loaded` and `memory_limit` as of `Limits`."""
        self.base, self.registry = base, registry
        limits = Limits(max_loaded=max_loaded, memory_limit=memory_limit, max_time=DAY, cache_tokens=32768)
        self._shelf = Shelf({}, registry, limits, Metrics())

    def known(self, request: ModelRequest) -> Known | None:
        """Of the model where it is loaded now; else None."""
        entry = self._shelf.entries.get(_name(request))
        engine = entry.engine if entry is not None else None
        return _known(engine.opened) if engine is not None and not engine.broken else None

    async def load(self, request: ModelRequest, report: Report) -> Known:
        """Loads the model, where it is not yet. Raises `TorchchatError` where it cannot be."""
        try:
            await self._fetch(request, report)
            async with self._shelf.use(_name(request)) as engine:
                return _known(engine.opened)
        except ApiError as error:
            raise _cause(error) from error

    async def answer(self, question: Question, report: Report) -> None:
        request = question.configuration.request(self.base)
        try:
            await self._fetch(request, report)
            async with self._shelf.use(_name(request)) as engine:
                await _answered(engine, question, report)
        except ApiError as error:
            raise _cause(error) from error

    async def close(self) -> None:
        await self._shelf.close()

    async def _fetch(self, request: ModelRequest, report: Report) -> None:
        """Downloads what is not here, and puts the model among those that can be used."""
        if self.known(request) is None:
            report(Status(f"loading {request.model or 'the model'}"))
            await asyncio.to_thread(self._fetched, request, report)
        self._shelf.add(_name(request), request)

    def _fetched(self, request: ModelRequest, report: Report) -> None:
        with shown_by(Shown(report)):
            fetch_files(request, self.registry)


def _name(request: ModelRequest) -> str:
    """One for each way to run a model; with the digest of what is not shown."""
    digest = hashlib.sha256(repr(replace(request, defaults=frozenset())).encode()).hexdigest()[:16]
    return f"{request.model or 'the model'} {digest}"


def _known(opened: OpenedModel) -> Known:
    return Known(name=opened.name, executor=opened.executor.name, device=opened.model.device, dtype=opened.model.dtype,
                 schemes=opened.schemes, limit=opened.max_seq_length, chats=opened.text_format.template is not None,
                 defaults=dict(opened.text_format.defaults))


def _cause(error: ApiError) -> TorchchatError:
    """What was wrong with the model, rather than what a server would say of it."""
    cause = error.__cause__
    while isinstance(cause, ApiError):
        cause = cause.__cause__
    return cause if isinstance(cause, TorchchatError) else TorchchatError(error.message)


async def _answered(engine: Engine, question: Question, report: Report) -> None:
    report(Status("reading the conversation"))
    plan = await asyncio.to_thread(make_plan, engine.opened, question)
    jobs = [Job(prompt=plan.prompt, options=plan.options, stream=index, client=question.asker)
            for index in range(question.configuration.num_samples)]
    answers = engine.submit(jobs)
    known = _known(engine.opened)
    made_by = f"{known.name}, {known.line}"
    tokens = [0] * len(jobs)
    try:
        while events := await answers.read():
            for index, event in events:
                if isinstance(event, TokenEvent):
                    tokens[index] += 1
                elif isinstance(event, TextEvent):
                    report(Text(index, event.text, tokens[index]))
                    tokens[index] = 0
                elif isinstance(event, FinishedEvent):
                    report(Ended(index, Details(model=made_by, reason=event.reason, notice=plan.notice,
                                                figures=Figures.of(event.statistics))))
    finally:
        answers.cancel()


# ---- the prompt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the model is given, and how it answers."""

    prompt: list[int]
    options: GenerationOptions
    notice: str = ""


def make_plan(opened: OpenedModel, question: Question) -> Plan:
    """A conversation for models that have a template; others continue the text, or a written dialogue.

    Raises `TorchchatError` for a prompt that is too long, and options that cannot be.
    """
    configuration, text_format = question.configuration, opened.text_format
    options = configuration.options(text_format.defaults)
    limit = opened.max_seq_length
    if text_format.template is None and not configuration.transcript:
        if configuration.system.strip():
            raise TorchchatError("this model has no chat template, and so no system prompt",
                                 "write what it should know into the text, or switch to a written dialogue")
        ids = encode_plain(continued(question.messages), text_format.tokenizer)
        check_prompt(ids, limit)
        return Plan(prompt=ids, options=options)
    messages = in_turns(question.messages)
    if configuration.system.strip():
        messages.insert(0, {"role": "system", "content": configuration.system})

    def prompt(part: Any) -> tuple[str, list[int]]:
        text, encode = render(text_format, part)
        return text, encode(text)

    fitting, _, ids = fitting_prompt(messages, limit, options, prompt)
    dropped = len(messages) - len(fitting)
    notice = f"The context of {limit} tokens is full: the oldest {dropped} messages were left out." if dropped else ""
    return Plan(prompt=ids, notice=notice,
                options=options if text_format.template is not None else with_stop(options, TRANSCRIPT_STOP))


def continued(messages: Any) -> str:
    """All that was written so far as one text; a blank where two words would run together."""
    text = ""
    for each in messages:
        glued = text and each.content and not text[-1].isspace() and each.content[0].isalnum() \
            and each.role == "user"
        text += (" " if glued else "") + each.content
    return text


# ---- progress -----------------------------------------------------------------------------------------------------


@dataclass
class ShownTask:
    """A task whose share is reported."""

    name: str
    total: int | None
    report: Report
    done: int = field(default=0, init=False)

    def advance(self, amount: int) -> None:
        self.done += amount
        self.tell()

    def set_total(self, total: int | None) -> None:
        self.total = total

    def tell(self) -> None:
        share = min(1.0, max(0.0, self.done / self.total)) if self.total else None
        self.report(Status(self.name, share))


@dataclass(frozen=True)
class Shown:
    """A reporter of `torchchat_core.progress` that tells a page."""

    report: Report

    def started(self, name: str, total: int | None, unit: Unit) -> ShownTask:  # noqa: ARG002
        task = ShownTask(name, total, self.report)
        task.tell()
        return task

    def finished(self, task: Any, completed: bool) -> None: ...
