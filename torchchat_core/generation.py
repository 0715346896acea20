"""The one loop over tokens: a prompt goes in, events come out.

Every frontend, and every measurement that generates, stands on `generate`; nothing else feeds a session token by
token, but for `batching`, which takes the same steps for many answers at once. What an answer makes of its logits is
`Answer`, for both of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from torchchat_core.constraints import CallConstraint, Constraint, constraint_for
from torchchat_core.errors import TorchchatError
from torchchat_core.generation_options import GenerationOptions
from torchchat_core.memory import peak_rss_bytes
from torchchat_core.sampling import Sampler
from torchchat_core.specs import BatchedModel, ForkingSession, PromptBatchingModel, ScoringSession, Session
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.stream import TextStream

PREFILL_CHUNK = 512  # tokens: bounds the memory of a prefill, and how long an interruption waits


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts, seconds and tokens per second of one answer."""

    prompt_tokens: int
    prefilled_tokens: int  # of the prompt, those that were not in the KV cache yet
    new_tokens: int
    ttft_s: float  # from the call to the first token
    prefill_tps: float | None  # None: too few tokens to say
    decode_tps: float | None
    peak_rss_bytes: int  # of the whole process since it started


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities as the model gives them: before constraints, bias, penalties, temperature."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # token and logarithm, likeliest first


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """A token was chosen."""

    token: int
    logprobs: TokenLogprobs | None = None  # where the options ask for them


@dataclass(frozen=True, kw_only=True)
class TextEvent:
    """Text is certain: it will not become part of a stop string, and it ends with a whole character."""

    text: str


@dataclass(frozen=True, kw_only=True)
class NoticeEvent:
    """Something that the user should know of, beside the answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class FinishedEvent:
    """The answer is complete. `reason` is "stop", "length" or "cancelled"."""

    reason: str
    text: str
    token_ids: tuple[int, ...]
    statistics: Statistics
    end: TokenEvent | None = None  # the end token, where one was chosen; it is no part of the answer


Event = TokenEvent | TextEvent | NoticeEvent | FinishedEvent
# What a reader is told of: each token and each piece of text; the text, and tokens only where the options ask for their
# logprobs; or the same with the text in one piece, at the end.
Told = Literal["tokens", "text", "end"]


class TokenSequence:
    """A session and the ids that it holds, so that what two prompts have in common is computed once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._tokens: list[int] = []

    @property
    def limit(self) -> int:
        return self.session.limit

    @property
    def held(self) -> list[int]:
        """Ids of the tokens in the cache."""
        return self._tokens[: self.session.length]  # an interruption can leave one of the two behind

    def begins_with(self, tokens: list[int]) -> bool:
        """Whether these are the first tokens of the cache."""
        return self.session.length >= len(tokens) and self._tokens[: len(tokens)] == tokens

    def reuse(self, tokens: Sequence[int]) -> int:
        """Cuts the session to what it shares with `tokens`, their last one excepted; the length that remains."""
        shared = shared_length(self.held, tokens[:-1])
        self.session.truncate(shared)
        del self._tokens[shared:]
        return shared

    def fork(self, length: int) -> TokenSequence:
        """Another sequence with the first `length` tokens, of an executor with ability `fork`."""
        copied = TokenSequence(cast(ForkingSession, self.session).fork(length))
        copied._tokens = self._tokens[:length]
        return copied

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Appends tokens; logits [vocab] at the last."""
        logits = self.session.prefill(tokens)
        self._tokens.extend(tokens)
        return logits

    def decode(self, token: int) -> Tensor:
        """Appends one token; logits [vocab]."""
        logits = self.session.decode(token)
        self._tokens.append(token)
        return logits

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Appends tokens; logits [n, vocab] at each, of an executor with ability `score`."""
        logits = cast(ScoringSession, self.session).score(tokens)
        self._tokens.extend(tokens)
        return logits

    def appended(self, tokens: Sequence[int]) -> None:
        """Says that the session was given tokens together with others."""
        self._tokens.extend(tokens)

    def appended_one(self, token: int) -> None:
        """The same of one token."""
        self._tokens.append(token)


def decode_together(model: BatchedModel, sequences: Sequence[TokenSequence], tokens: Sequence[int]) -> Tensor:
    """Appends one token to each of the sequences in one step; logits [sequences, vocab]."""
    logits = model.decode_batch([sequence.session for sequence in sequences], tokens)
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.appended_one(token)
    return logits


def prefill_together(model: PromptBatchingModel, sequences: Sequence[TokenSequence],
                     prompts: Sequence[Sequence[int]]) -> Tensor:
    """Appends tokens to each of the sequences in one call; logits [sequences, vocab] at the last of each."""
    logits = model.prefill_batch([sequence.session for sequence in sequences], prompts)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        sequence.appended(prompt)
    return logits


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high - 1:  # they agree up to `low`, and not up to `high`
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def generate(
    sequence: TokenSequence,
    prompt: Sequence[int],
    text_format: TextFormat,
    options: GenerationOptions,
    *,
    at_start: bool = False,
    stream: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Answers `prompt` (token ids): yields `TokenEvent` and `TextEvent` as they come, `FinishedEvent` at the end.

    Figures count the time spent here alone, not what the reader of the events does between them.
    `at_start` says that the text begins with the answer, so that a tokenizer's prefix space is taken off; `stream`
    tells several answers with one seed apart; `cancelled` is asked before every step.
    Raises `TorchchatError` for an empty prompt, or one that leaves no room for an answer.
    """
    check_prompt(prompt, sequence.limit)
    clock = Clock(len(prompt))
    for event in _generate(sequence, prompt, text_format, options, at_start, stream, cancelled, clock):
        clock.pause()  # what the reader does with an event is not the model's time
        yield event
        clock.go_on()


def _generate(sequence: TokenSequence, prompt: Sequence[int], text_format: TextFormat, options: GenerationOptions,
              at_start: bool, stream: int, cancelled: Callable[[], bool], clock: Clock) -> Iterator[Event]:
    answer = Answer(prompt, text_format, options, clock, limit=sequence.limit, at_start=at_start, stream=stream)
    logits = _prefill(sequence, prompt, clock, cancelled)
    while logits is not None:
        yield from answer.take(logits)
        if answer.reason is not None or cancelled():
            break
        logits = sequence.decode(answer.token)
    yield from answer.finish()


class Answer:
    """One answer as it comes: logits go in, events come out. Who has it computes the logits of what it chose."""

    def __init__(self, prompt: Sequence[int], text_format: TextFormat, options: GenerationOptions, clock: Clock, *,
                 limit: int, at_start: bool = False, stream: int = 0, told: Told = "tokens") -> None:
        """`limit`: tokens of the sequence; `told`: what there are events of.

        Raises `TorchchatError` where the options ask for a grammar that is none.
        """
        self.reason: str | None = None  # why it ended
        self.token = -1  # chosen last
        self.clock = clock
        self._options = options
        self._sampler = Sampler(options.sampling, prompt, stream)
        self._constraint = _constraint(options, text_format)
        self._decoder = TextStream(text_format.tokenizer, at_start=at_start, shown=options.shown)
        self._stops = StopMatcher(options.stop)
        # Whether the likeliest token is what `take` would choose, so that several answers can look for it at once.
        self.takes_the_likeliest = (self._sampler.takes_the_likeliest and self._constraint is None
                                    and options.logprobs is None)
        self._end_ids = text_format.end_ids
        self._room = limit - len(prompt)
        self._tells_tokens = told == "tokens" or options.logprobs is not None
        self._tells_text = told != "end"
        self._decodes = self._tells_text or bool(options.stop)  # else there is time for it at the end
        self._end: TokenEvent | None = None
        self._produced: list[int] = []
        self._pieces: list[str] = []

    def take(self, logits: Tensor) -> list[Event]:
        """Chooses the next token for logits [vocab]; where it is the last one, `reason` says why.

        Raises `TorchchatError` where the logits leave nothing to choose from.
        """
        permitted = logits if self._constraint is None else self._constraint.apply(logits)
        token = self._sampler.choose(permitted)
        wanted = self._options.logprobs
        return self.take_token(token, None if wanted is None else token_logprobs(logits, token, wanted))

    def take_token(self, token: int, logprobs: TokenLogprobs | None = None) -> list[Event]:
        """Goes on with a token that was chosen."""
        self.clock.count_token()
        self.token = token
        if token in self._end_ids:
            self.reason = "stop"
            self._end = TokenEvent(token=token, logprobs=logprobs)
            return []
        self._produced.append(token)
        events: list[Event] = [TokenEvent(token=token, logprobs=logprobs)] if self._tells_tokens else []
        if self._decodes:
            events += self._certain(self._stops.push(self._decoder.push(token)))
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._stops.found or (self._constraint is not None and self._constraint.complete):
            self.reason = "stop"
        elif len(self._produced) == self._options.max_new_tokens or len(self._produced) >= self._room:
            self.reason = "length"
        return events

    def finish(self) -> list[Event]:
        """What was held back, and the last event. An answer that has not ended was cancelled."""
        late = "" if self._decodes else self._decoder.push_all(self._produced)
        rest = "" if self._stops.found else self._stops.push(late + self._decoder.finish())
        events = self._certain(rest if self._stops.found else rest + self._stops.finish())
        text = "".join(self._pieces)
        if text and not self._tells_text:
            events = [TextEvent(text=text)]
        return [*events, FinishedEvent(
            reason=self.reason or "cancelled", text=text, token_ids=tuple(self._produced),
            statistics=self.clock.statistics(len(self._produced)), end=self._end)]

    def _certain(self, text: str) -> list[Event]:
        if not text:
            return []
        self._pieces.append(text)
        return [TextEvent(text=text)] if self._tells_text else []


def _constraint(options: GenerationOptions, text_format: TextFormat) -> Constraint | CallConstraint | None:
    if options.grammar is not None:
        return constraint_for(options.grammar, text_format)
    return CallConstraint(options.calls, text_format) if options.calls is not None else None


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of a token and of the `count` likeliest ones, from logits [vocab]."""
    found = torch.log_softmax(logits.double(), 0)
    top = torch.topk(found, min(count, found.shape[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(chosen=float(found[token]), top=tuple(pairs))


def check_prompt(prompt: Sequence[int], limit: int) -> None:
    """Raises `TorchchatError` for an empty prompt, or one that leaves no room for an answer."""
    if not prompt:
        raise TorchchatError("the prompt is empty, and the tokenizer has no token to begin a text with",
                             "give a --prompt")
    if len(prompt) >= limit:
        raise TorchchatError(f"the prompt has {len(prompt)} tokens; with an answer it has to fit into {limit}",
                             "shorten it, or allow more with --max-seq-length where the model can")


def _prefill(sequence: TokenSequence, prompt: Sequence[int], clock: Clock,
             cancelled: Callable[[], bool]) -> Tensor | None:
    """Logits at the prompt's last token, or None where it was cancelled before."""
    logits = None
    done = clock.reused = sequence.reuse(prompt)
    while done < len(prompt) and not cancelled():
        chunk = prompt[done : done + PREFILL_CHUNK]
        logits = sequence.prefill(chunk)
        done += len(chunk)
    clock.prefilled = clock.now()
    return logits if done == len(prompt) else None


class StopMatcher:
    """Holds text back while it may be the beginning of a stop string; the stop string itself never comes out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """Takes text, gives what is certain of all that was taken."""
        if not self._stops:
            return text
        self._held += text
        first = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.found = True
            return self._held[:first]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class Clock:
    """When things happened in one call of `generate`."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.reused = 0
        self._paused_at = 0.0
        self._idle = 0.0  # seconds that the reader of the events took
        self.started = self.now()
        self.prefilled = self.started
        self._first: float | None = None
        self._last = self.started
        self._steps = 0

    def now(self) -> float:
        return time.perf_counter() - self._idle

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def go_on(self) -> None:
        self._idle += time.perf_counter() - self._paused_at

    def count_token(self) -> None:
        self._last = self.now()
        self._first = self._first or self._last
        self._steps += 1

    def statistics(self, new_tokens: int) -> Statistics:
        first = self._first or self._last
        computed = self.prompt_tokens - self.reused
        return Statistics(
            prompt_tokens=self.prompt_tokens,
            prefilled_tokens=computed,
            new_tokens=new_tokens,
            ttft_s=first - self.started,
            prefill_tps=_rate(computed, self.prefilled - self.started),
            decode_tps=_rate(self._steps - 1, self._last - first),
            peak_rss_bytes=peak_rss_bytes(),
        )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
