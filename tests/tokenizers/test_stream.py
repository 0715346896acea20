"""Text comes whole out of a stream of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.stream import TextStream

PATHS = ["tokenizers/llama2/tokenizer.model", "tinyllamas/stories260K/tok512.model",
         "tokenizers/mistral-v3/tokenizer.model", "tokenizers/llama3/tokenizer.model",
         "hf/TinyStories-656K/tokenizer.json", "tokenizers/phi-2/tokenizer.json"]
FAMILY = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"  # one picture of five characters
Real = Callable[[str], Tokenizer]


def parts(tokenizer: Tokenizer, ids: list[int], at_start: bool = True) -> list[str]:
    stream, at_once = TextStream(tokenizer, at_start=at_start), TextStream(tokenizer, at_start=at_start)
    found = [*[stream.push(token) for token in ids], stream.finish()]
    assert at_once.push_all(ids) + at_once.finish() == "".join(found)
    return found


@pytest.mark.parametrize("path", PATHS)
def test_the_parts_of_a_text_are_the_text(path: str, testdata: Path, real: Real) -> None:
    tokenizer = real(path)
    strings = json.loads((testdata / "golden/tokenizers.json").read_text("utf-8"))["strings"]
    for text in [*strings, FAMILY * 3, " \N{GRINNING FACE} ", "\ufffd"]:
        ids = tokenizer.encode(text)
        streamed = parts(tokenizer, ids)
        assert "".join(streamed) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in streamed)


@pytest.mark.parametrize("path", PATHS)
def test_the_parts_of_random_tokens_are_their_text(path: str, real: Real) -> None:
    """Random tokens are full of bytes that are no UTF-8, of control tokens, and of ids beyond the vocabulary."""
    tokenizer = real(path)
    chance = random.Random(0)
    short = [token for token in range(min(tokenizer.vocab_size, 600)) if len(tokenizer.token_bytes(token)) == 1]
    for _ in range(300):
        ids = [chance.choice(short) if short and chance.random() < 0.5 else chance.randrange(tokenizer.vocab_size + 9)
               for _ in range(chance.randrange(40))]
        assert "".join(parts(tokenizer, ids)) == tokenizer.decode(ids)
        control = set(tokenizer.special_tokens.values())
        data = b"".join(tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b"\xef\xbf\xbd"
                        for token in ids if token not in control)
        assert "".join(parts(tokenizer, ids, at_start=False)) == data.decode("utf-8", errors="replace")


def test_a_character_of_four_tokens_appears_with_the_last(real: Real) -> None:
    tokenizer = real("tokenizers/llama2/tokenizer.model")
    ids = [token for token in tokenizer.encode("\N{GRINNING FACE}") if tokenizer.token_bytes(token) != b" "]
    assert len(ids) == 4
    assert parts(tokenizer, ids) == ["", "", "", "\N{GRINNING FACE}", ""]


def test_a_character_that_is_cut_off_at_the_end_is_marked_by_finish(real: Real) -> None:
    tokenizer = real("tokenizers/llama2/tokenizer.model")
    ids = tokenizer.encode("a\N{GRINNING FACE}")[:-1]
    assert parts(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_invalid_bytes_do_not_hold_up_what_follows(real: Real) -> None:
    tokenizer = real("tokenizers/llama2/tokenizer.model")
    byte = {tokenizer.token_bytes(token): token for token in range(3, 259)}
    assert parts(tokenizer, [byte[b"\xf0"], byte[b"\x9f"], *tokenizer.encode("x")]) == ["", "", "\ufffd x", ""]


def test_the_prefix_space_is_taken_off_only_at_the_start(real: Real) -> None:
    tokenizer = real("tokenizers/llama2/tokenizer.model")
    ids = tokenizer.encode("one two")
    assert parts(tokenizer, ids) == ["one", " two", ""]
    assert parts(tokenizer, ids, at_start=False) == [" one", " two", ""]
    assert parts(tokenizer, [tokenizer.bos_id or 0, *ids]) == ["", "one", " two", ""]


def test_a_control_token_inside_a_character_does_not_break_it(real: Real) -> None:
    tokenizer = real("tokenizers/llama2/tokenizer.model")
    ids = tokenizer.encode("\N{GRINNING FACE}")
    assert "".join(parts(tokenizer, [*ids[:3], 2, *ids[3:]])) == "\N{GRINNING FACE}"


def test_an_id_beyond_the_vocabulary_is_shown_as_unknown(real: Real) -> None:
    tokenizer = real("tinyllamas/stories260K/tok512.model")
    assert parts(tokenizer, [512, 10_000]) == ["\ufffd", "\ufffd", ""]
    with pytest.raises(TorchchatError, match="512 is outside the vocabulary, which has 0 to 511"):
        tokenizer.token_bytes(512)
    with pytest.raises(TorchchatError, match="-1 is outside"):
        TextStream(tokenizer, at_start=True).push(-1)
