"""Answers to many prompts: several at once where the executor can, else one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from torchchat_core import progress
from torchchat_core.generation import PREFILL_CHUNK, StopMatcher, TokenSequence, check_prompt
from torchchat_core.generation_options import GenerationOptions
from torchchat_core.pipeline import OpenedModel
from torchchat_core.sampling import Sampler
from torchchat_core.specs import BatchedModel
from torchchat_core.tokenizers.stream import TextStream

TOGETHER = 8  # answers at once


@dataclass(frozen=True)
class Prompt:
    """What is to be answered."""

    tokens: tuple[int, ...]
    options: GenerationOptions


@dataclass
class _Answer:
    """One answer in progress."""

    index: int
    prompt: Prompt
    opened: OpenedModel
    sequence: TokenSequence
    token: int = -1  # chosen last
    done: bool = False
    text: str = ""
    count: int = 0
    sampler: Sampler = field(init=False)
    stream: TextStream = field(init=False)
    stops: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.prompt.options.sampling, self.prompt.tokens, self.index)
        self.stream = TextStream(self.opened.text_format.tokenizer, at_start=False)
        self.stops = StopMatcher(self.prompt.options.stop)

    def take(self, logits: Tensor) -> None:
        """Chooses the next token for logits [vocab]."""
        self.token = self.sampler.choose(logits)
        if self.token not in self.opened.text_format.end_ids:
            self.count += 1
            self.text += self.stops.push(self.stream.push(self.token))
            full = len(self.prompt.tokens) + self.count >= self.sequence.limit
            self.done = self.stops.found or full or self.count == self.prompt.options.max_new_tokens
        else:
            self.done = True
        if self.done and not self.stops.found:
            self.text += self.stops.push(self.stream.finish())
            if not self.stops.found:
                self.text += self.stops.finish()


def answers(opened: OpenedModel, prompts: Sequence[Prompt], name: str) -> list[str]:
    """The text of each answer, without its stop string; `name` is for progress.

    Raises `TorchchatError` for a prompt that is empty or leaves no room for an answer.
    """
    for prompt in prompts:
        check_prompt(prompt.tokens, opened.max_seq_length)
    found: dict[int, str] = {}
    waiting = sorted(range(len(prompts)), key=lambda index: prompts[index].tokens, reverse=True)
    width = TOGETHER if "batch" in opened.executor.abilities else 1
    sequences = [TokenSequence(opened.model.session(opened.max_seq_length)) for _ in range(min(width, len(prompts)))]
    active: list[_Answer] = []
    try:
        with progress.task(name, total=len(prompts)) as task:
            while waiting or active:
                taken = {id(answer.sequence) for answer in active}
                for sequence in [each for each in sequences if id(each) not in taken][: len(waiting)]:
                    index = waiting.pop()
                    active.append(_begun(_Answer(index, prompts[index], opened, sequence)))
                finished = [answer for answer in active if answer.done]
                found |= {answer.index: answer.text for answer in finished}
                task.advance(len(finished))
                active = [answer for answer in active if not answer.done]
                _step(opened, active)
    finally:
        for sequence in sequences:
            sequence.session.close()
    return [found[index] for index in range(len(prompts))]


def _begun(answer: _Answer) -> _Answer:
    """Reads the prompt, as far as the session does not hold it, and chooses the first token."""
    tokens = answer.prompt.tokens
    done = answer.sequence.reuse(tokens)
    while done < len(tokens):
        logits = answer.sequence.prefill(tokens[done : done + PREFILL_CHUNK])
        done += PREFILL_CHUNK
    answer.take(logits)
    return answer


def _step(opened: OpenedModel, active: Sequence[_Answer]) -> None:
    """One more token for each: in one step of the model where there are several."""
    if len(active) == 1:
        active[0].take(active[0].sequence.decode(active[0].token))
    elif active:
        rows = cast(BatchedModel, opened.model).decode_batch([each.sequence.session for each in active],
                                                             [each.token for each in active])
        for answer, row in zip(active, rows, strict=True):
            answer.sequence.appended(answer.token)
            answer.take(row)
