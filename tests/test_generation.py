"""The loop over tokens: what it emits, when it ends, and what it does not compute twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tc_eager.executor import EagerExecutor
from torchchat_core import generation
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import (
    FinishedEvent,
    StopMatcher,
    TextEvent,
    TokenEvent,
    TokenSequence,
    generate,
)
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.specs import LoadRequest
from torchchat_core.text_format import TextFormat

GREEDY = SamplingOptions(temperature=0.0)


def options(**fields: Any) -> GenerationOptions:
    return GenerationOptions(sampling=GREEDY, **fields)


def texts(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, TextEvent)]


@pytest.mark.parametrize(("fields", "text", "reason"), [
    ({}, "Hello, big world", "stop"),
    ({"max_new_tokens": 5}, "Hello", "length"),
    ({"stop": (" big",)}, "Hello,", "stop"),
    ({"stop": ("zzz", "world")}, "Hello, big ", "stop"),
    ({"stop": ("world!",)}, "Hello, big world", "stop"),
    ({"max_new_tokens": 16}, "Hello, big world", "length"),
])
def test_an_answer_ends_for_the_right_reason(fields: dict[str, Any], text: str, reason: str, scripted: Any,
                                             byte_format: TextFormat) -> None:
    events = list(generate(TokenSequence(scripted("Hello, big world")), [5, 6], byte_format, options(**fields)))
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.text, finished.reason) == (text, reason)
    assert "".join(texts(events)) == text
    assert [event.token for event in events if isinstance(event, TokenEvent)] == list(finished.token_ids)
    assert 1 not in finished.token_ids  # the end token is no part of the answer


def test_a_character_of_several_tokens_comes_whole(scripted: Any, byte_format: TextFormat) -> None:
    events = list(generate(TokenSequence(scripted("é😀日")), [5], byte_format, options()))
    assert texts(events) == ["é", "😀", "日"]


def test_a_character_that_is_cut_off_is_shown_as_such(scripted: Any, byte_format: TextFormat) -> None:
    events = list(generate(TokenSequence(scripted("a😀")), [5], byte_format, options(max_new_tokens=3)))
    assert "".join(texts(events)) == "a\ufffd"


def test_the_context_is_never_overrun(scripted: Any, byte_format: TextFormat) -> None:
    session = scripted("Hello, big world", limit=10)
    finished = list(generate(TokenSequence(session), [5] * 6, byte_format, options()))[-1]
    assert (finished.reason, len(finished.token_ids)) == ("length", 4)
    assert session.length <= 10


def test_cancelling_ends_before_the_next_token(scripted: Any, byte_format: TextFormat) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    finished = list(generate(TokenSequence(scripted("Hello")), [5], byte_format, options(), cancelled=cancelled))[-1]
    assert (finished.reason, finished.text) == ("cancelled", "Hell")


def test_cancelling_before_the_prefill_gives_an_empty_answer(scripted: Any, byte_format: TextFormat) -> None:
    finished = list(generate(TokenSequence(scripted("x")), [5], byte_format, options(), cancelled=lambda: True))[-1]
    assert (finished.reason, finished.token_ids, finished.statistics.decode_tps) == ("cancelled", (), None)


@pytest.mark.parametrize(("count", "limit", "message"), [
    (0, 10, "the prompt is empty"), (10, 10, "the prompt has 10 tokens; with an answer it has to fit into 10"),
])
def test_a_prompt_of_the_wrong_length_is_told(count: int, limit: int, message: str, scripted: Any,
                                              byte_format: TextFormat) -> None:
    from torchchat_core.generation import check_prompt

    with pytest.raises(TorchchatError, match=message):
        check_prompt([5] * count, limit)


def test_long_prompts_are_prefilled_in_chunks(scripted: Any, byte_format: TextFormat) -> None:
    session = scripted("x")
    list(generate(TokenSequence(session), [5] * 1100, byte_format, options()))
    assert session.prefilled == [512, 512, 76]


def test_what_two_prompts_share_is_computed_once(scripted: Any, byte_format: TextFormat) -> None:
    session = scripted("ab")
    sequence = TokenSequence(session)
    finished = list(generate(sequence, [5] * 50, byte_format, options()))[-1]
    assert finished.statistics.prefilled_tokens == 50
    finished = list(generate(sequence, [5] * 50 + list(finished.token_ids) + [9, 9], byte_format, options()))[-1]
    assert finished.statistics.prefilled_tokens == 2
    finished = list(generate(sequence, [5] * 30, byte_format, options()))[-1]  # the last token always gives logits
    assert (finished.statistics.prefilled_tokens, session.prefilled) == (1, [50, 2, 1])


def test_a_reused_cache_gives_the_same_tokens_as_a_fresh_one(make_tiny_model: Callable[..., Any],
                                                             byte_format: TextFormat) -> None:
    module = make_tiny_model(vocab_size=259, sliding_window=9)
    model = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))
    reused = TokenSequence(model.session())
    for prompt in ([7] * 20, [7] * 12 + [30] * 5, [7] * 12 + [30] * 5 + [8] * 9, [40]):
        again = list(generate(reused, prompt, byte_format, options(max_new_tokens=12)))[-1]
        fresh = list(generate(TokenSequence(model.session()), prompt, byte_format, options(max_new_tokens=12)))[-1]
        assert again.token_ids == fresh.token_ids


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b"), ("\n\n", "\nUser:"), ("xyz",), ()])
def test_stop_strings_never_come_out_however_the_text_is_cut(stops: tuple[str, ...]) -> None:
    for text in ("xxaaabyy", "a\nUser\n\nb", "xyxyzz", "no stop", "\nUse"):
        first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        for size in (1, 2, 3, 100):
            matcher, shown = StopMatcher(stops), ""
            for at in range(0, len(text), size):
                shown += matcher.push(text[at : at + size])
                if matcher.found:
                    break
            if not matcher.found:
                shown += matcher.finish()
            assert shown == text[:first]


def test_wrong_options_are_told() -> None:
    with pytest.raises(TorchchatError, match="max_new_tokens is 0"):
        GenerationOptions(max_new_tokens=0)
    with pytest.raises(TorchchatError, match="a stop string is empty"):
        GenerationOptions(stop=("",))


def test_figures_leave_out_what_the_reader_does(scripted: Any, byte_format: TextFormat,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0.0, 0.001)  # a millisecond for each look at the clock
    reading = [0.0]
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: next(seconds) + reading[0]))
    for event in generate(TokenSequence(scripted("Hello, world")), [5], byte_format, options()):
        if isinstance(event, FinishedEvent):
            assert event.statistics.decode_tps is not None
            assert event.statistics.decode_tps > 100
        reading[0] += 20
