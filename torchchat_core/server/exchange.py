"""What every endpoint does around its answer: the model in use, options, usage, and how JSON and events are sent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from torchchat_core.batching import Job
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import Event, FinishedEvent, TokenEvent
from torchchat_core.generation_options import CallGrammar, GenerationOptions, Grammar, SamplingOptions
from torchchat_core.server.engine import Answers, Engine
from torchchat_core.server.errors import ApiError, ClientGone, refused, server_ends
from torchchat_core.server.limits import Limits
from torchchat_core.server.metrics import Metrics
from torchchat_core.server.prompts import BoundedTokenizer
from torchchat_core.server.schemas import Sampling, StreamOptions
from torchchat_core.server.shelf import Shelf
from torchchat_core.specs import Tokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.base import text_bytes

Result = TypeVar("Result")
SMALLEST_TOP_P = 1e-9  # what top_p 0 means: the likeliest token alone
LAST_WORD = 1.0  # seconds that it may take when the server ends
LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON cannot say


@dataclass(frozen=True)
class Service:
    """What the endpoints share."""

    shelf: Shelf
    limits: Limits
    metrics: Metrics
    fingerprint: str
    # Large requests are parsed one at a time, and their texts are encoded one at a time.
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "torchchat-bodies"))
    encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "torchchat-prompts"))


class Exchange:
    """One request, from the moment its model is in use until its answer is sent or its client has gone."""

    def __init__(self, service: Service, request: Request, model: str, large: bool = False) -> None:
        """`large` is True for a body that must not be processed at the same time as others."""
        self.large = large
        self._left = False
        self.service = service
        self.request = request
        self.model = model
        self.created = int(time.time())
        self.engine: Engine
        self._answers: Answers | None = None

    async def open(self) -> None:
        """Has the model loaded, and keeps it so until `close`."""
        shelf = self.service.shelf
        engine = shelf.take_loaded(self.model)
        self.engine = await self.watched(shelf.take(self.model)) if engine is None else engine

    def close(self) -> None:
        """Once, after `open`."""
        self._left = True
        if self._answers is not None:
            self._answers.cancel()
        self.service.shelf.give_back(self.model)

    async def prepare(self, count: int, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run the function that makes prompts from the request off the event loop; it counts as `count` queued answers.

        Raises `ApiError` 429 if the queue is full, 504 on timeout, and `ClientGone` if the client disconnects.
        """
        loop = asyncio.get_running_loop()
        with self.engine.reserved(count):
            if not self.large:
                return await loop.run_in_executor(None, function, *arguments)
            try:
                async with asyncio.timeout(self.service.limits.max_time):
                    return await self.watched(loop.run_in_executor(self.service.encoder, function, *arguments))
            except TimeoutError:
                raise ApiError(504, "reading the request timed out", code="timeout") from None

    def text_format(self, param: str, least: int = 0) -> TextFormat:
        """Return the model's text format with a tokenizer that rejects prompts that are too long.

        The limit is the longest possible prompt, or `least` tokens if that is more.
        """
        found = self.engine.opened.text_format
        bounded = BoundedTokenizer(found.tokenizer, max(self.most_tokens, least), param, lambda: self._left)
        return dataclasses.replace(found, tokenizer=cast(Tokenizer, bounded))

    @property
    def most_tokens(self) -> int:
        """The length of the longest prompt."""
        opened = self.engine.opened
        return min(self.service.limits.max_prompt_tokens or opened.max_seq_length, opened.max_seq_length - 1)

    def submit(self, jobs: Sequence[Job], stream: bool | None) -> Answers:
        """Has answers made, whose places become free at the end of the exchange at the latest."""
        self._answers = self.engine.submit(jobs, told="text" if stream else "end")
        return self._answers

    def client(self, user: str | None) -> str:
        """Whose request it is, for the sake of fairness."""
        return user or (self.request.client.host if self.request.client else "")

    def options(self, body: Sampling, max_new_tokens: int | None, *, grammar: Grammar | None = None,
                calls: CallGrammar | None = None, logprobs: int | None = None,
                shown: frozenset[int] = frozenset(), param: str = "max_tokens") -> GenerationOptions:
        """Raises `ApiError` 400 for values that the model or the server does not take."""
        most = self.service.limits.max_output_tokens
        if most and (max_new_tokens or 0) > most:
            raise ApiError(400, f"{param} is {max_new_tokens}; this server gives at most {most}", param,
                           "invalid_value")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty")
        values: dict[str, Any] = {"temperature": 1.0, **self.engine.opened.text_format.defaults}
        values |= {name: value for name in names if (value := getattr(body, name)) is not None}
        values["top_p"] = max(values.get("top_p", 1.0), SMALLEST_TOP_P)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        try:
            sampling = SamplingOptions(**values, seed=None if body.seed is None else body.seed % (1 << 64),
                                       logit_bias=self._bias(body))
            return GenerationOptions(sampling=sampling, max_new_tokens=max_new_tokens or most or None, stop=stop,
                                     grammar=grammar, calls=calls, logprobs=logprobs, shown=shown)
        except TorchchatError as error:
            raise refused(error) from None

    def _bias(self, body: Sampling) -> dict[int, float]:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        size = self.engine.opened.model.vocab_size
        outside = [token for token in bias if token >= size]
        if outside:
            raise ApiError(400, f"logit_bias names token {outside[0]}; the vocabulary ends at {size - 1}", "logit_bias",
                           "invalid_value")
        return bias

    def check_prompt(self, prompt: Sequence[int], param: str) -> None:
        """Raises `ApiError` 400 for a prompt that is empty, too long, or not of this model's tokens."""
        opened, most = self.engine.opened, self.most_tokens
        if not prompt:
            raise ApiError(400, f"{param} has no tokens, and the model has none to begin a text with", param)
        if len(prompt) > most:
            raise ApiError(400, f"{param} has {len(prompt)} tokens; at most {most} are possible", param,
                           "context_length_exceeded")
        if max(prompt) >= opened.model.vocab_size:
            raise ApiError(400, f"{param} has token {max(prompt)}; the vocabulary ends at "
                                f"{opened.model.vocab_size - 1}", param, "invalid_value")

    def stream(self, events: AsyncIterator[str]) -> EventStream:
        """A response of `events`, with whose end the exchange ends. The client has for it as long again as answers may
        take."""
        return EventStream(events, self.close, 2 * self.service.limits.max_time)

    async def collect(self, answers: Answers, choices: Sequence[Taker]) -> None:
        """Gives every event to its choice, until all answers are complete.

        Raises `ApiError` where one failed, `ClientGone` when the client goes away.
        """
        watcher = asyncio.create_task(_gone(self.request.receive))
        watcher.add_done_callback(lambda _: answers.leave())
        try:
            while events := await answers.read():
                for place, event in events:
                    choices[place].take(event)
        finally:
            watcher.cancel()

    async def watched(self, work: Awaitable[Result]) -> Result:
        """The result of `work`, which is given up when the client goes away: `ClientGone` then."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.create_task(_gone(self.request.receive))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            for each in (task, watcher):
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. When the client goes away, or does not read them in time, `events` is closed; `close` is
    called in any case."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], seconds: float) -> None:
        """`seconds`: that the client has for reading it."""
        self._events, self._close, self._seconds = events, close, seconds
        self._begun = False
        super().__init__(None, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(_gone(receive))
        broken_off = False
        try:
            await asyncio.wait({writer, watcher}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        except asyncio.CancelledError:  # the server ends
            broken_off = True
        finally:
            for task in (writer, watcher):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            self._close()
        if broken_off:
            await self._break_off(send)

    async def _break_off(self, send: Send) -> None:
        """The last event, unless the client does not read it."""
        if not self._begun:
            raise asyncio.CancelledError
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD):
                await send({"type": "http.response.body",
                            "body": (data_event(server_ends().body) + DONE_EVENT).encode()})

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._begun = True
        async for text in self._events:
            await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


json_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_text(content).encode("utf-8", "replace"), status, headers, "application/json")


def data_event(content: object) -> str:
    """A server-sent event without a name."""
    return f"data: {json_text(content)}\n\n"


DONE_EVENT = "data: [DONE]\n\n"


_ids = random.Random()  # nobody may do more for knowing an id


def new_id(prefix: str) -> str:
    return f"{prefix}{_ids.getrandbits(128):032x}"


class Taker(Protocol):
    """One choice of an answer."""

    def take(self, event: Event) -> None: ...


class StreamedChoice(Taker, Protocol):
    """One choice of an answer that is streamed."""

    end: FinishedEvent | None

    def opening(self) -> list[str]:
        """What stands in chunks before anything is generated, as JSON."""

    def parts(self) -> list[str]:
        """What is new since the last call, as it stands in chunks: objects of `choices` as JSON."""


async def chunks(answers: Answers, choices: Sequence[StreamedChoice], head: Mapping[str, Any], prompt_tokens: int,
                 options: StreamOptions | None) -> AsyncIterator[str]:
    """The stream of chat and text completions: a chunk for what is new of each choice, usage where it is asked for,
    and the end. An answer that fails ends the stream with its error.

    `head` is the same in all chunks, and is written once.
    """
    counted = options is not None and bool(options.include_usage)
    before, after = f'data: {json_text(head)[:-1]},"choices":[', ']' + (',"usage":null' if counted else "") + "}\n\n"

    def written(parts: Iterable[str]) -> str:
        return "".join([f"{before}{part}{after}" for part in parts])

    try:
        if opening := written(part for choice in choices for part in choice.opening()):
            yield opening
        while events := await answers.read():
            for place, event in events:
                choices[place].take(event)
            touched = dict.fromkeys(place for place, _ in events)
            if found := written(part for place in touched for part in choices[place].parts()):
                yield found
    except ApiError as error:
        yield data_event(error.body) + DONE_EVENT
        return
    if counted:
        ends = [choice.end for choice in choices if choice.end is not None]
        yield data_event({**head, "choices": [], "usage": usage(prompt_tokens, ends, answers.jobs)})
    yield DONE_EVENT


def usage(prompt_tokens: int, finished: Sequence[FinishedEvent], jobs: Sequence[Job]) -> dict[str, Any]:
    """`usage` of chat and text completions. An end token that was chosen counts as a token of the answer."""
    completion = sum(map(generated_tokens, finished))
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": min((job.reused for job in jobs), default=0)}}


def generated_tokens(finished: FinishedEvent) -> int:
    """How many the model has chosen: those of the text, and the end token, for which a step was made too."""
    return len(finished.token_ids) + (finished.end is not None)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return text_bytes(tokenizer, token).decode("utf-8", "replace")


def logprob_entry(tokenizer: Tokenizer, event: TokenEvent) -> dict[str, Any]:
    """One token in the form of chat completions."""
    if event.logprobs is None:
        return {}

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token), "logprob": max(logprob, LEAST_LOGPROB),
                "bytes": list(text_bytes(tokenizer, token))}

    return {**entry(event.token, event.logprobs.chosen),
            "top_logprobs": [entry(token, logprob) for token, logprob in event.logprobs.top]}
