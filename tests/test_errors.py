"""The parts that messages are made of."""

from __future__ import annotations

import pytest

from torchchat_core.errors import near_matches, quoted


@pytest.mark.parametrize("value", ["", "nan", 3, 2.5, None, [1, "a"], {"a": None}, b"x", "line\nbreak"])
def test_a_short_value_is_quoted_as_its_repr(value: object) -> None:
    assert quoted(value) == repr(value)


def test_a_long_text_keeps_its_beginning_and_ends_in_dots() -> None:
    assert quoted("a" * 200_000) == "'" + "a" * 56 + "..."


@pytest.mark.parametrize("value", [
    "x" * 61, "\x00" * 40, b"y" * 100, ["x" * 100] * 100, {str(n): n for n in range(1000)}, [[[[[[[["deep"]]]]]]]],
    pytest.param(10**5000, id="integer")])
def test_no_quoted_value_is_longer_than_60_characters(value: object) -> None:
    assert len(quoted(value)) <= 60


@pytest.mark.parametrize(("typed", "known", "expected"), [
    ("eagre", ["eager", "compile"], ["eager"]),
    ("Embeded", ["embedded", "llama3"], ["embedded"]),
    ("qwen", ["qwen3-0.6b", "llama3"], ["qwen3-0.6b"]),
    ("chats", ["chat", "generate"], ["chat"]),
    ("browser", ["where", "server", "remove"], []),
    ("gpu", ["cpu", "cuda"], []),
    ("dtype", ["type-of-file", "device"], []),
    ("x", ["xyz"], []),
    ("", ["a"], []),
])
def test_only_likely_misspellings_are_near(typed: str, known: list[str], expected: list[str]) -> None:
    assert near_matches(typed, known) == expected


def test_near_matches_of_a_long_text_cost_nothing() -> None:
    assert near_matches("a" * 10_000_000, ["a" * 900, "b"]) == []
