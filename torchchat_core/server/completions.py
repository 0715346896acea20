"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from torchchat_core.batching import Job
from torchchat_core.conversation import encode_plain
from torchchat_core.generation import Event, FinishedEvent, TextEvent, TokenEvent, TokenLogprobs
from torchchat_core.server.errors import ApiError
from torchchat_core.server.exchange import (
    LEAST_LOGPROB,
    Exchange,
    chunks,
    json_response,
    json_text,
    new_id,
    token_text,
    usage,
)
from torchchat_core.server.schemas import CompletionRequest
from torchchat_core.server.scoring import Scored, score_prompts
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.stream import TextStream

DEFAULT_LENGTH = 16  # tokens, as OpenAI's interface has it
SHORT = 1000  # characters that are encoded before another thread would begin to


async def answer(exchange: Exchange, body: CompletionRequest) -> Response:
    tokenizer = exchange.engine.opened.text_format.tokenizer
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    answers_wanted = (len(body.prompt) if several else 1) * (body.n or 1)
    exchange.engine.check_room(answers_wanted)  # before any work is done
    prompts = await prompts_of(body.prompt, exchange, "prompt", answers_wanted)
    for prompt in prompts:
        exchange.check_prompt(prompt, "prompt")
    length = DEFAULT_LENGTH if body.max_tokens is None else body.max_tokens
    if length == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0; without echo there would be no answer", "max_tokens", "invalid_value")
    options = exchange.options(body, length or 1, logprobs=body.logprobs)
    count = body.n or 1
    scored: Sequence[Scored | None] = [None] * len(prompts)
    if body.echo and body.logprobs is not None:
        scored = await exchange.watched(score_prompts(exchange.engine, prompts, body.logprobs))
    choices = [Choice(row * count + index, tokenizer, prompt if body.echo else (), body.logprobs, scored[row],
                      generated=length > 0)
               for row, prompt in enumerate(prompts) for index in range(count)]
    jobs = [Job(prompt=prompt, options=options, stream=index, client=exchange.client(body.user))
            for prompt in prompts for index in range(count)] if length else []
    answers = exchange.submit(jobs, body.stream)
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": exchange.created, "model": body.model,
            "system_fingerprint": exchange.service.fingerprint}
    prompt_tokens = sum(map(len, prompts))
    if body.stream:
        return exchange.stream(chunks(answers, choices, head, prompt_tokens, body.stream_options))
    await exchange.collect(answers, choices)
    ends = [choice.end for choice in choices if choice.end]
    return json_response({**head, "choices": [choice.whole() for choice in choices],
                          "usage": usage(prompt_tokens, ends, jobs)})


async def prompts_of(prompt: str | list[str] | list[int] | list[list[int]], exchange: Exchange, param: str,
                     count: int = 1) -> list[list[int]]:
    """Return the token ids of each prompt. Names of control tokens become control tokens, as in `generate --raw`.

    `param` is the field of the request, `count` the number of its answers. Raises `ApiError` 400 if a text is too long.
    """
    tokenizer = exchange.text_format(param).tokenizer
    if isinstance(prompt, str) and len(prompt) <= SHORT:
        return _encoded(prompt, tokenizer)
    return await exchange.prepare(count, _encoded, prompt, tokenizer)


def _encoded(prompt: str | list[str] | list[int] | list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    if isinstance(prompt, str):
        return [encode_plain(prompt, tokenizer, special=True)]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [encode_plain(each, tokenizer, special=True) if isinstance(each, str) else list(each)
            for each in prompt if not isinstance(each, int)]


@dataclass
class Choice:
    """One of the answers, as it comes; with `echoed` the tokens of its prompt stand before it."""

    index: int
    tokenizer: Tokenizer
    echoed: Sequence[int]
    logprobs: int | None
    scored: Scored | None  # of the echoed tokens
    generated: bool  # whether tokens follow the prompt
    end: FinishedEvent | None = field(default=None, init=False)
    text: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._tokens: list[tuple[int, TokenLogprobs | None, int]] = []  # the last one: where in the text it begins
        self._sent, self._tokens_sent, self._offset, self._told = 0, 0, 0, False
        if self.echoed:
            self.text = self.tokenizer.decode(self.echoed)
            self._stream = TextStream(self.tokenizer, at_start=True)
            found = self.scored.logprobs if self.scored else [None] * len(self.echoed)
            for token, logprobs in zip(self.echoed, found, strict=True):
                self._note(token, logprobs)
            self._offset = len(self.text)
        self._stream = TextStream(self.tokenizer, at_start=False)

    def _note(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Offsets count the text as it is decoded: of a character in several tokens, the last one brings it."""
        self._tokens.append((token, logprobs, self._offset))
        if self.logprobs is not None:
            self._offset += len(self._stream.push(token))

    def take(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self._note(event.token, event.logprobs)
        elif isinstance(event, TextEvent):
            self.text += event.text
        elif isinstance(event, FinishedEvent):
            self.end = event
            if event.end is not None:  # evaluations count on as many entries as tokens were chosen
                self._note(event.end.token, event.end.logprobs)

    def opening(self) -> list[str]:
        """The echo, which may be all."""
        return [json_text(self.part())] if self.echoed or not self.generated else []

    def parts(self) -> list[str]:
        if self.end is not None:
            return [] if self._told else [json_text(self.part())]
        if len(self.text) == self._sent:
            return []
        if self.logprobs is not None:
            return [json_text(self.part())]
        # What nearly all chunks are, put together by hand: for small models it is these that take the time.
        text, self._sent = self.text[self._sent :], len(self.text)
        return [f'{{"index":{self.index},"text":{json_text(text)},"finish_reason":null,"logprobs":null}}']

    def whole(self) -> dict[str, Any]:
        return self.part()

    def part(self) -> dict[str, Any]:
        """What is new since the last call."""
        text, self._sent = self.text[self._sent :], len(self.text)
        tokens, self._tokens_sent = self._tokens[self._tokens_sent :], len(self._tokens)
        self._told = self.end is not None
        reason = self.end.reason if self.end else None if self.generated else "length"
        return {"index": self.index, "text": text, "finish_reason": reason,
                "logprobs": None if self.logprobs is None else self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs | None, int]]) -> dict[str, Any]:
        """Parallel lists, as the interface has them; null for the first token of a text."""
        return {"tokens": [token_text(self.tokenizer, token) for token, _, _ in tokens],
                "text_offset": [offset for _, _, offset in tokens],
                "token_logprobs": [None if found is None else max(found.chosen, LEAST_LOGPROB)
                                   for _, found, _ in tokens],
                "top_logprobs": [None if found is None else self._top(token, found) for token, found, _ in tokens]}

    def _top(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the chosen one where it is not among them."""
        top: dict[str, float] = {}
        for other, logprob in (*found.top, (token, found.chosen)):
            top.setdefault(token_text(self.tokenizer, other), max(logprob, LEAST_LOGPROB))
        return top
