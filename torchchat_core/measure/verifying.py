"""`torchchat verify`: whether two ways to run a model say the same.

One model is loaded at a time: what the first one says waits on disk (see `divergence`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torchchat_core import progress
from torchchat_core.artifacts import exported_file, open_artifact
from torchchat_core.conversation import encode_plain, render
from torchchat_core.errors import TorchchatError
from torchchat_core.measure.agreement import Agreement, AgreementSum, recorded
from torchchat_core.measure.divergence import reference_file
from torchchat_core.measure.limits import Limits, limits_for, objections
from torchchat_core.measure.passages import Continuation, Exercise, Rows, exercises
from torchchat_core.measure.text import MeasuredText, encoded, text_windows, window_size
from torchchat_core.pipeline import ModelRequest, OpenedModel, fetch_files, open_checkpoint, open_model
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import parse_recipe
from torchchat_core.specs import ExecutorInfo
from torchchat_core.text_format import TextFormat

GREEDY_TOKENS = 32
DAY = datetime(2031, 11, 9)  # for templates that write the date
USER, ASSISTANT = {"role": "user", "content": "Hello, who are you?"}, {"role": "assistant", "content": "I am a model."}
CONVERSATIONS: Sequence[Sequence[Mapping[str, Any]]] = (
    (USER,), ({"role": "user", "content": "What are </s> and <|im_end|>?"}, ASSISTANT, USER),
    ({"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER))


Prompts = tuple[tuple[int, ...] | None, ...]  # token ids of each prompt; None if the template rejects it


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two, as it was opened."""

    model: str
    executor: str
    device: str
    dtype: str
    schemes: tuple[str, ...]  # of its quantised layers
    recipe: str | None  # what they were made by

    def __str__(self) -> str:
        return ", ".join([self.model, self.executor, self.device, self.dtype, *([self.recipe] if self.recipe else [])])

    @classmethod
    def of(cls, opened: OpenedModel) -> Side:
        return cls(model=opened.name, executor=opened.executor.name, device=opened.model.device,
                   dtype=opened.model.dtype, schemes=opened.schemes, recipe=opened.recipe)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Two models on the same tokens, and whether that is good enough."""

    first: Side
    second: Side
    text: MeasuredText
    window: int  # tokens
    same_tokens: bool  # whether both tokenizers make the same tokens of the text
    same_prompts: bool  # both encode plain text with BOS and chat prompts to the same tokens
    agreement: Agreement
    limits: Limits
    candidates: tuple[str, str] | None  # texts of the tokens where greedy continuations part first

    @property
    def objections(self) -> tuple[str, ...]:
        """Why they disagree, one sentence each; none where they agree."""
        tokens = () if self.same_tokens else ("their tokenizers make different tokens of the text",)
        if self.same_tokens and not self.same_prompts:
            tokens = ("they encode chat prompts or plain text differently",)
        return (*tokens, *objections(self.agreement, self.limits))

    @property
    def agrees(self) -> bool:
        return not self.objections


def verify(first: ModelRequest, second: ModelRequest, registry: Registry, text: MeasuredText, *,
           window: int | None = None, greedy_tokens: int = GREEDY_TOKENS,
           limits: Mapping[str, float | None] | None = None) -> Verification:
    """Runs the same tokens through both. The first model's tokenizer makes them; `limits` replace those for the pair.

    Raises `TorchchatError` where one of the two cannot be run, and for models of different vocabularies.
    """
    _check(first, second, registry)
    longest = sys.maxsize
    while True:  # once more where the second model holds less than was recorded
        with ExitStack() as stack:
            recording = _recording(first, registry, text, window, greedy_tokens, longest, stack)
            with open_model(second, registry) as opened:
                if opened.max_seq_length < recording.needed and window is None:
                    longest = opened.max_seq_length
                    continue
                return recording.verification(opened, dict(limits or {}))


def _check(first: ModelRequest, second: ModelRequest, registry: Registry) -> None:
    """Raise `TorchchatError` for errors that can be found before the models run, which may take minutes."""
    if second.executor != "auto":
        registry.find(ExecutorInfo, second.executor)
    if second.quantize is not None:
        parse_recipe(second.quantize, registry)
    (one, expected), (other, found) = (_vocabulary(request, registry) for request in (first, second))
    if found != expected:
        raise TorchchatError(f"the vocabularies differ: {one} has {expected} tokens, {other} has {found}",
                             "compare two ways to run the same model")


def _vocabulary(request: ModelRequest, registry: Registry) -> tuple[str, int]:
    """Return the model's name and vocabulary size, without reading its weights."""
    files = fetch_files(request, registry)
    exported = exported_file(files)
    config = open_artifact(exported).manifest.config if exported is not None else \
        open_checkpoint(request, files, registry).config
    return files.ref.text, config.vocab_size


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """The first model, and what it said."""

    side: Side
    text: MeasuredText
    ids: tuple[int, ...]
    prompts: Prompts
    window: int
    exercise: tuple[Exercise, ...]
    summed: AgreementSum

    @property
    def needed(self) -> int:
        """Tokens that a session has to hold."""
        return max(each.longest for each in self.exercise)

    def verification(self, opened: OpenedModel, asked: Mapping[str, float | None]) -> Verification:
        """What the second model says, beside the first."""
        if opened.max_seq_length < self.needed:
            raise TorchchatError(f"{opened.name} holds {opened.max_seq_length} tokens; with these windows "
                                 f"{self.needed} are needed",
                                 f"leave --window out, or make it smaller than {self.window}")
        _run_through(opened, self.exercise, self.summed.observed(opened.model, self.exercise, _scores(opened)))
        tokenizer, side, found = opened.text_format.tokenizer, Side.of(opened), self.summed.result
        limits = limits_for((self.side.dtype, side.dtype), (self.side.recipe, side.recipe)).changed(**asked)
        apart = found.first_difference
        one, other = (tokenizer.decode([token]) for token in apart.tokens) if apart else ("", "")
        return Verification(first=self.side, second=side, text=self.text, window=self.window, agreement=found,
                            same_tokens=tuple(tokenizer.encode(self.text.content)) == self.ids, limits=limits,
                            same_prompts=_prompts(opened.text_format) == self.prompts,
                            candidates=(one, other) if apart else None)


def _recording(request: ModelRequest, registry: Registry, text: MeasuredText, window: int | None, greedy_tokens: int,
               longest: int, stack: ExitStack) -> _Recording:
    with open_model(request, registry) as opened:  # gone afterwards: its memory is needed for the second model
        tokenizer, limit = opened.text_format.tokenizer, min(opened.max_seq_length, longest)
        ids, size = encoded(text, tokenizer), window_size(window, limit)
        exercise = tuple(exercises(text_windows(ids, tokenizer.bos_id, size), limit, greedy_tokens))
        positions = sum(each.positions for each in exercise)
        reference = stack.enter_context(reference_file(positions, opened.model.vocab_size))
        _run_through(opened, exercise, recorded(opened.model, exercise, _scores(opened), reference))
        continuations = {each.index: each for each in exercise if isinstance(each, Continuation)}
        return _Recording(side=Side.of(opened), text=text, ids=tuple(ids), window=size,
                          prompts=_prompts(opened.text_format), exercise=exercise,
                          summed=AgreementSum(reference, continuations))


def _prompts(text_format: TextFormat) -> Prompts:
    """Return the ids of plain text and of chat prompts; None for a conversation that the template rejects."""
    def ids(messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...] | None:
        try:
            text, encode = render(text_format, [dict(message) for message in messages],
                                  variables={"strftime_now": DAY.strftime})
        except TorchchatError:
            return None
        return tuple(encode(text))

    return (tuple(encode_plain("Hello", text_format.tokenizer)), *map(ids, CONVERSATIONS))


def _scores(opened: OpenedModel) -> bool:
    return "score" in opened.executor.abilities


def _run_through(opened: OpenedModel, exercise: Iterable[Exercise], rows: Iterable[Rows]) -> None:
    """Takes all of the rows, which are kept or compared as they come."""
    total = sum(each.positions for each in exercise)
    with progress.task(f"{opened.name}, {opened.executor.name}", total=total) as task:
        for each in rows:
            task.advance(len(each.logits))


def another(request: ModelRequest, model: str) -> ModelRequest:
    """Another model under the same conditions: device, dtype and length are kept, files and recipe are its own.

    An exported file keeps its own device and dtype: they count as settings, which it does not take.
    """
    kept = {name: getattr(request, name) for name in ("device", "dtype", "max_seq_length", "hf_token")}
    return dataclasses.replace(ModelRequest(model=model), **kept, defaults=frozenset({"device", "dtype", "executor"}))
