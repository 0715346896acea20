"""A server elsewhere that speaks OpenAI's interface: `torchchat server`, or any other."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.figures import Details, Figures
from tc_streamlit_chat.questions import Ended, Question, Report, Status, Text, in_turns
from torchchat_core.errors import TorchchatError, quoted

CONNECT_SECONDS = 10.0
LINE_BYTES = 1 << 20  # of one event of a stream


class RemoteModels:
    """A backend. Everything but `models` belongs to one event loop."""

    remote = True

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """`url` with or without /v1 at its end; `model`: what requests ask for, else the first one of the server.

        Raises `TorchchatError` for what is no http or https URL.
        """
        self.url = _base(url)
        self.model = model
        self.models: tuple[str, ...] = ()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def connect(self) -> None:
        """Asks which models there are. Raises `TorchchatError` where the server cannot be reached, or has none."""
        try:
            answer = httpx.get(f"{self.url}/models", headers=self._headers, timeout=CONNECT_SECONDS)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.is_error:
            raise TorchchatError(f"{self.url} refused: {_told(answer.content, answer.status_code)}",
                                 "--api-key K gives a key" if answer.status_code in (401, 403) else None)
        try:
            self.models = tuple(str(each["id"]) for each in answer.json()["data"])
        except (ValueError, KeyError, TypeError):
            raise TorchchatError(f"{self.url}/models does not answer as OpenAI's interface does",
                                 "give the address that ends in /v1") from None
        if not self.models:
            raise TorchchatError(f"{self.url} has no models")
        if self.model is None:
            self.model = self.models[0]

    async def answer(self, question: Question, report: Report) -> None:
        model = question.configuration.model or self.model
        report(Status(f"waiting for {model}"))
        reader = _Reader(report, f"{model}, {self.url}")
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        try:
            async with httpx.AsyncClient(headers=self._headers, timeout=timeout) as client, \
                    client.stream("POST", f"{self.url}/chat/completions", json=_body(question, str(model))) as answer:
                if answer.is_error:
                    raise TorchchatError(f"the server refused: {_told(await answer.aread(), answer.status_code)}")
                async for line in answer.aiter_lines():
                    if reader.take(line):
                        break
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        reader.end(question.configuration.num_samples)

    async def close(self) -> None: ...

    def _unreachable(self, error: Exception) -> TorchchatError:
        return TorchchatError(f"{self.url} cannot be reached: {error or type(error).__name__}",
                              "is the server running? torchchat server MODEL starts one")


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise TorchchatError(f"--url is {quoted(url)}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TorchchatError(f"--url is {quoted(url)}; it has to be the address of a server",
                             "--url http://127.0.0.1:8000/v1")
    path = url.rstrip("/")
    return path if path.endswith("/v1") or parsed.path not in ("", "/") else f"{path}/v1"


def _body(question: Question, model: str) -> dict[str, Any]:
    """The request: nothing that nobody chose, since servers differ in what they take."""
    configuration: Configuration = question.configuration
    system = [{"role": "system", "content": configuration.system}] if configuration.system.strip() else []
    body: dict[str, Any] = {
        "model": model, "stream": True, "stream_options": {"include_usage": True},
        "messages": [*system, *in_turns(question.messages)],
        **{name: value for name, value in configuration.sampling.items() if value is not None}}
    if body.get("logit_bias"):
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    if configuration.max_new_tokens is not None:
        body["max_tokens"] = configuration.max_new_tokens
    if configuration.stop:
        body["stop"] = list(configuration.stop)
    if configuration.num_samples > 1:
        body["n"] = configuration.num_samples
    return body


def _told(content: bytes, status: int) -> str:
    """What an error's body says, as a sentence."""
    try:
        found = json.loads(content)
        error = found.get("error", found) if isinstance(found, dict) else found
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        message = None
    return f"{message:.500} (status {status})" if isinstance(message, str) and message else f"status {status}"


@dataclass
class _Reader:
    """The events of a stream, and the times at which they came."""

    report: Report
    made_by: str
    started: float = field(default_factory=time.perf_counter)
    first: dict[int, float] = field(default_factory=dict)  # of each answer
    last: dict[int, float] = field(default_factory=dict)
    pieces: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)

    def take(self, line: str) -> bool:
        """Reads one line of the stream; whether it is the last. Raises `TorchchatError` for an error in the stream."""
        if len(line) > LINE_BYTES:
            raise TorchchatError(f"the server sent a line of {len(line)} characters; {LINE_BYTES} are the most")
        name, _, content = line.partition(":")
        if name != "data":
            return False
        content = content.strip()
        if content == "[DONE]":
            return True
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            raise TorchchatError(f"the answer of the server is not JSON: {quoted(content)}") from None
        if not isinstance(found, dict):
            raise TorchchatError(f"the answer of the server is not an event: {quoted(content)}")
        if found.get("error"):
            raise TorchchatError(f"the server failed: {_told(content.encode(), 200)}")
        if isinstance(found.get("usage"), dict):
            self.usage = found["usage"]
        for choice in found.get("choices") or ():
            self._choice(choice)
        return False

    def _choice(self, choice: Any) -> None:
        if not isinstance(choice, dict):
            return
        index = choice.get("index", 0)
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(index, int) and isinstance(text, str) and text:
            now = time.perf_counter()
            self.first.setdefault(index, now)
            self.last[index] = now
            self.pieces[index] = self.pieces.get(index, 0) + 1
            self.report(Text(index, text))
        if isinstance(index, int) and choice.get("finish_reason"):
            self.reasons[index] = str(choice["finish_reason"])

    def end(self, count: int) -> None:
        """Says that each of the answers is complete. The server's counts are those of all answers together."""
        prompt = _count(self.usage.get("prompt_tokens"))
        cached = _count((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        whole = _count(self.usage.get("completion_tokens"))
        for index in range(count):
            tokens = whole if count == 1 else self.pieces.get(index, 0)
            span = self.last.get(index, 0.0) - self.first.get(index, 0.0)
            self.report(Ended(index, Details(
                model=self.made_by, reason=self.reasons.get(index, "stop"),
                figures=Figures(new_tokens=tokens, prompt_tokens=prompt,
                                ttft_s=self.first[index] - self.started if index in self.first else None,
                                decode_tps=(tokens - 1) / span if tokens and span > 0 else None,
                                prefilled_tokens=prompt - cached if prompt is not None and cached is not None
                                else None))))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
