"""The executor contract finds each kind of fault. This file is also the plugin that offers the faulty executors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tc_eager.executor import EagerExecutor, EagerModel, EagerSession
from torchchat_core.hookspecs import hookimpl
from torchchat_core.models.attention import Segment
from torchchat_core.specs import ExecutorInfo, LoadRequest
from torchchat_core.testing import ExecutorContract


class Right:
    """An executor without a fault, made so that each of its parts can be replaced by a faulty one."""

    Session: type[EagerSession] = EagerSession
    Model: type[EagerModel] = EagerModel
    abilities = frozenset({"score", "batch", "prompt_batch", "fork", "embed"})
    dtypes = frozenset({"fp32"})

    def load(self, request: LoadRequest) -> EagerModel:
        model = EagerExecutor().load(request)
        model.__class__ = type("Model", (self.Model,), {"session": self._session})
        return model

    @property
    def _session(self) -> Any:
        kind, model_kind = self.Session, self.Model

        def session(model: EagerModel, limit: int | None = None) -> EagerSession:
            made = model_kind.session(model, limit)
            made.__class__ = kind
            return made

        return session


# ---- wrong results --------------------------------------------------------------------------------------------------


class Imprecise(Right):
    class Session(EagerSession):
        def _append(self, tokens: Sequence[int], **how: bool) -> Tensor:
            return super()._append(tokens, **how) * 1.001


class WithoutWindow(Right):
    def load(self, request: LoadRequest) -> EagerModel:
        request.module.config = replace(request.module.config, sliding_window=None)
        return super().load(request)


class WrongInHalfPrecision(Right):
    dtypes = frozenset({"fp32", "bf16"})

    def load(self, request: LoadRequest) -> EagerModel:
        if request.dtype == "bf16":
            request.module.model.norm.weight.mul_(1.2)
        return super().load(request)


class SecondBest(Right):
    class Session(EagerSession):
        @torch.inference_mode()
        def decode(self, token: int) -> Tensor:
            logits = super().decode(token)
            logits[logits.argmax()] = logits.min()
            return logits


class HalfPrecisionLogits(Right):
    class Session(EagerSession):
        def prefill(self, tokens: Sequence[int]) -> Tensor:
            return super().prefill(tokens).bfloat16()


class LogitsOfAllPositions(Right):
    class Session(EagerSession):
        def prefill(self, tokens: Sequence[int]) -> Tensor:
            return self.score(tokens)


class OneBuffer(Right):
    class Session(EagerSession):
        @torch.inference_mode()
        def _append(self, tokens: Sequence[int], **how: bool) -> Tensor:
            logits = super()._append(tokens, **how)
            self.buffer = getattr(self, "buffer", logits)
            return self.buffer.copy_(logits)


class SaysAnotherDevice(Right):
    class Model(EagerModel):
        @property
        def device(self) -> str:
            return "cpu:0"

        @device.setter
        def device(self, name: str) -> None:
            pass


class EndlessContext(Right):
    class Model(EagerModel):
        max_context = property(lambda _: 1 << 20, lambda *_: None)


# ---- wrong state ----------------------------------------------------------------------------------------------------


class BeginsAnew(Right):
    class Session(EagerSession):
        def prefill(self, tokens: Sequence[int]) -> Tensor:
            self.truncate(0)
            return super().prefill(tokens)


class SpoilsWhatIsKept(Right):
    class Session(EagerSession):
        @torch.inference_mode()
        def truncate(self, length: int) -> None:
            super().truncate(length)
            for keys in self.cache._keys:
                keys[:, max(length - 2, 0) : length] = 0


class CutsTooLittle(Right):
    class Session(EagerSession):
        def truncate(self, length: int) -> None:
            super().truncate(max(length, min(self.length, 1)))


class OneCacheForAll(Right):
    class Model(EagerModel):
        def session(self, limit: int | None = None) -> EagerSession:
            made = super().session(limit)
            self.shared = getattr(self, "shared", made.cache)
            made.cache = self.shared
            return made


class ClosesAll(Right):
    class Session(EagerSession):
        def close(self) -> None:
            for cache in self._model.caches:
                cache.release()

    class Model(EagerModel):
        def session(self, limit: int | None = None) -> EagerSession:
            made = super().session(limit)
            self.caches = [*getattr(self, "caches", []), made.cache]
            return made


class ClosesOnce(Right):
    class Session(EagerSession):
        def close(self) -> None:
            super().close()
            del self.cache


class CountsPromptsOnly(Right):
    class Session(EagerSession):
        decoded = 0

        @property
        def length(self) -> int:
            return self.cache.length - self.decoded

        def decode(self, token: int) -> Tensor:
            logits = super().decode(token)
            self.decoded += 1
            return logits


# ---- wrong limits ---------------------------------------------------------------------------------------------------


class LastPlaceIsMissing(Right):
    class Session(EagerSession):
        def check_room(self, count: int) -> None:
            super().check_room(count + 1)


class ForgetsTheLimit(Right):
    class Model(EagerModel):
        def session(self, limit: int | None = None) -> EagerSession:
            return super().session(None if limit is None or 1 <= limit <= self.max_context else limit)


class FailsWithIndexError(Right):
    class Session(EagerSession):
        def check_room(self, count: int) -> None:
            if self.length + count > self.limit:
                raise IndexError("too many")


class TakesAnyLimit(Right):
    class Model(EagerModel):
        def session(self, limit: int | None = None) -> EagerSession:
            return super().session(None if limit is None else min(max(limit, 1), self.max_context))


class CutsToMore(Right):
    class Session(EagerSession):
        def truncate(self, length: int) -> None:
            super().truncate(min(max(length, 0), self.length))


class TakesAnyToken(Right):
    class Model(EagerModel):
        def forward(self, tokens: Sequence[int], *arguments: Any, **named: Any) -> Tensor:
            return super().forward([token % self.vocab_size for token in tokens], *arguments, **named)


class ChangesBeforeItRefuses(Right):
    class Session(EagerSession):
        def prefill(self, tokens: Sequence[int]) -> Tensor:
            logits = [self.decode(token) for token in tokens]
            return logits[-1] if logits else super().prefill(tokens)


# ---- wrong abilities ------------------------------------------------------------------------------------------------


class ScoresOneLate(Right):
    class Session(EagerSession):
        def score(self, tokens: Sequence[int]) -> Tensor:
            return super().score(tokens).roll(1, 0)


class ScoresAndForgets(Right):
    class Session(EagerSession):
        def score(self, tokens: Sequence[int]) -> Tensor:
            before = self.length
            logits = super().score(tokens)
            self.truncate(before)
            return logits


class OnePositionForAll(Right):
    class Model(EagerModel):
        def _decoded(self, sessions: Sequence[EagerSession], tokens: Sequence[int], extended: bool) -> Tensor:
            segments = [Segment(session.cache, 1) for session in sessions]
            return self.forward(tokens, [sessions[0].length] * len(sessions), segments, None, extended)


class BatchByTurns(Right):
    class Model(EagerModel):
        def decode_batch(self, sessions: Sequence[EagerSession], tokens: Sequence[int]) -> Tensor:
            return torch.stack([session.decode(token) for session, token in zip(sessions, tokens, strict=False)])


class CopiesAll(Right):
    """A copy that goes beyond what was asked for."""

    class Session(EagerSession):
        def fork(self, length: int) -> EagerSession:
            return super().fork(self.length)


class PromptsByPadding(Right):
    """All prompts are taken to be as long as the longest one."""

    class Model(EagerModel):
        def prefill_batch(self, sessions: Any, prompts: Any) -> Tensor:
            longest = max(map(len, prompts))
            return super().prefill_batch(sessions, [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])


class EmbedsLogits(Right):
    """Not the hidden states, but twice them."""

    class Session(EagerSession):
        def embed(self, tokens: Sequence[int]) -> Tensor:
            return super().embed(tokens) * 2


class HidesAnAbility(Right):
    abilities = frozenset({"score", "prompt_batch", "fork", "embed"})


# ---- memory that stays ----------------------------------------------------------------------------------------------


class SessionStaysOpen(Right):
    class Session(EagerSession):
        def close(self) -> None:
            self.cache.length = 0


class ModelStaysOpen(Right):
    class Model(EagerModel):
        def close(self) -> None:
            pass


TABLE = [
    (Imprecise, "test_logits_are_those_of_the_reference", "logits are off by 0.001"),
    (WithoutWindow, "test_logits_are_those_of_the_reference", "(sliding-window-cpu-fp32): logits are off"),
    (WrongInHalfPrecision, "test_logits_are_those_of_the_reference", "(llama-cpu-bf16): logits are off"),
    (SecondBest, "test_greedy_tokens_are_those_of_the_reference", "the likeliest token is"),
    (HalfPrecisionLogits, "test_logits_are_float32_on_the_cpu", "prefill returns bfloat16 on cpu"),
    (LogitsOfAllPositions, "test_logits_are_float32_on_the_cpu", "returns logits [3, 96]"),
    (OneBuffer, "test_logits_stay_as_they_were_given", "change when the next token is decoded"),
    (SaysAnotherDevice, "test_the_model_says_what_it_is", "'device': 'cpu:0'"),
    (EndlessContext, "test_the_model_says_what_it_is", "max_context is 1048576"),
    (BeginsAnew, "test_a_prompt_in_parts_gives_what_it_gives_at_once", "prefill of 1 to 5"),
    (SpoilsWhatIsKept, "test_cutting_and_going_on_equals_a_fresh_sequence", "after truncate("),
    (CutsTooLittle, "test_cutting_and_going_on_equals_a_fresh_sequence", "after truncate(0) the length is 1"),
    (OneCacheForAll, "test_sessions_do_not_see_each_other", "steps of several sessions by turns"),
    (ClosesAll, "test_closing_a_session_leaves_the_others", "after another closed"),
    (ClosesOnce, "test_closing_twice_does_nothing", "raised AttributeError"),
    (CountsPromptsOnly, "test_length_counts_the_tokens_held", "the length is [0, 3, 3,"),
    (LastPlaceIsMissing, "test_a_session_holds_as_much_as_its_limit", "its limit is 5"),
    (ForgetsTheLimit, "test_a_session_holds_as_much_as_its_limit", "session(5).limit is 128"),
    (FailsWithIndexError, "test_too_many_tokens_are_refused_and_change_nothing", "raised IndexError: too many"),
    (ChangesBeforeItRefuses, "test_too_many_tokens_are_refused_and_change_nothing", "the length is 5 instead of 3"),
    (TakesAnyLimit, "test_impossible_limits_are_refused", "session(0) of a model with max_context 128 was accepted"),
    (CutsToMore, "test_impossible_cuts_are_refused_and_change_nothing", "truncate(4) of a session that holds 3 tokens"),
    (TakesAnyToken, "test_wrong_tokens_are_refused_and_change_nothing", "decoding token 96 with a vocabulary"),
    (ChangesBeforeItRefuses, "test_wrong_tokens_are_refused_and_change_nothing", "the length is 5 instead of 3"),
    (ScoresOneLate, "test_score_gives_the_logits_of_every_position", "score of the first tokens"),
    (ScoresAndForgets, "test_score_gives_the_logits_of_every_position", "score behind what is held"),
    (OnePositionForAll, "test_a_batch_gives_each_session_what_it_gets_alone", "a step of three sessions"),
    (BatchByTurns, "test_an_impossible_batch_is_refused_and_changes_nothing", "a batch of two sessions and one token"),
    (PromptsByPadding, "test_prompts_together_give_each_session_what_it_gets_alone", "prompts of three sessions"),
    (CopiesAll, "test_a_copy_goes_its_own_way", "a copy of 3 tokens holds 5"),
    (EmbedsLogits, "test_hidden_states_lead_to_the_logits", "the reference's head on hidden states"),
    (HidesAnAbility, "test_undeclared_abilities_are_absent", "has decode_batch(), and does not declare 'batch'"),
    (SessionStaysOpen, "test_closing_a_session_frees_its_memory", "was used and closed 6 times"),
    (ModelStaysOpen, "test_closing_a_model_frees_its_memory", "was used and closed 6 times"),
]


@hookimpl
def torchchat_executors() -> list[ExecutorInfo]:
    return [ExecutorInfo(name=executor.__name__.lower(), summary="faulty", factory=f"{__name__}:{executor.__name__}",
                         reads=frozenset({"module"}), devices=frozenset({"cpu"}), dtypes=executor.dtypes,
                         abilities=executor.abilities) for executor in {Right, *(row[0] for row in TABLE)}]


def contract(executor: type[Right]) -> type[ExecutorContract]:
    """The contract of one of the executors, as a test class of this module."""
    name = f"Contract{executor.__name__}"
    globals()[name] = globals().get(name) or type(name, (ExecutorContract,), {
        "plugin": __name__, "name": executor.__name__.lower(), "variants": ("llama", "sliding-window"),
        "__module__": __name__})
    return globals()[name]


FAULTS = [(contract(executor), test, words) for executor, test, words in TABLE]


class TestRight(ExecutorContract):
    plugin, name = __name__, "right"
    variants = ("llama", "sliding-window")


@pytest.mark.parametrize(("contract", "test", "words"), FAULTS)
def test_the_fault_is_found(contract: type, test: str, words: str, failures: Mapping[tuple[str, str], str]) -> None:
    assert words in failures[contract.__name__, test]


def test_every_demand_has_a_fault() -> None:
    assert {name for name in dir(ExecutorContract) if name.startswith("test_")} == {test for _, test, _ in FAULTS}
