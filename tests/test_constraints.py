"""Which tokens a grammar permits, whatever the tokenizer."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch

from torchchat_core.constraints import _failure, check_grammar, constraint_for, schema_grammar
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import FinishedEvent, TokenSequence, generate
from torchchat_core.generation_options import GenerationOptions, Grammar, SamplingOptions
from torchchat_core.testing.models import TinyTokenizer
from torchchat_core.text_format import TextFormat


def permitted(constraint: Any, size: int = 259) -> set[int]:
    return set(torch.isfinite(constraint.apply(torch.zeros(size))).nonzero()[:, 0].tolist())


def ids(text: str) -> list[int]:
    return TinyTokenizer().encode(text)


def test_only_tokens_that_go_on_are_permitted_and_the_end_comes_with_the_text(byte_format: TextFormat) -> None:
    constraint = constraint_for(schema_grammar({"enum": [12, 15]}), byte_format)
    assert permitted(constraint) == set(ids("1"))
    constraint.accept(ids("1")[0])
    assert permitted(constraint) == set(ids("25"))
    assert not constraint.complete
    constraint.accept(ids("5")[0])
    assert constraint.complete
    assert permitted(constraint) == {1}  # </s>


def test_a_token_that_breaks_the_grammar_is_an_error(byte_format: TextFormat) -> None:
    constraint = constraint_for(schema_grammar({"type": "object"}), byte_format)
    with pytest.raises(TorchchatError, match="no token for what the answer has to go on with"):
        constraint.accept(ids("x")[0])


class _Letters(TinyTokenizer):
    """A byte tokenizer without a token for one of the bytes."""

    def token_bytes(self, token: int) -> bytes:
        data = super().token_bytes(token)
        return b"~" if data == b"\xc3" else data


def test_an_answer_that_the_vocabulary_cannot_continue_is_a_plain_error() -> None:
    lacking = TextFormat(_Letters(), None, frozenset({1}), {})
    constraint = constraint_for(schema_grammar({"const": "a\u00e9"}), lacking)
    for token in ids('"a'):
        constraint.accept(token)
    with pytest.raises(TorchchatError, match="the model's vocabulary has no token") as caught:
        constraint.apply(torch.zeros(259))
    assert "NoExtension" not in str(caught.value)


@pytest.mark.parametrize(("reason", "message"), [
    ("NoExtensionBias\n<non-verbose/>", "vocabulary has no token"),
    ("lexer error: too many states: 19 >= 2\n<non-verbose/>", "too much work for one token"),
    ("Parser Error: Current row has 3 items; max is 1; consider ...", "too much work for one token"),
    ("panic: called `Result::unwrap()` on an `Err` value: PyErr", "grammar of the answer failed"),
])
def test_messages_of_the_grammar_library_are_translated(reason: str, message: str) -> None:
    assert message in _failure(reason).message
    assert "non-verbose" not in str(_failure(reason))


def test_ids_beyond_the_tokenizer_are_never_permitted(byte_format: TextFormat) -> None:
    constraint = constraint_for(schema_grammar({"type": "string"}), byte_format)
    assert permitted(constraint, 512) == permitted(constraint, 259)


@pytest.mark.parametrize(("schema", "message"), [
    ([], "is an object"), ({"type": "wrong"}, "cannot be used"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"$ref": "http://example.org/x"}, "cannot be used"),
], ids=str)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(TorchchatError, match=message):
        schema_grammar(schema)


def test_a_tokenizer_that_was_constrained_is_let_go() -> None:
    tokenizer = TinyTokenizer()
    constraint = constraint_for(schema_grammar({"type": "object"}), TextFormat(tokenizer, None, frozenset({1}), {}))
    assert constraint.apply(torch.zeros(tokenizer.vocab_size)).isfinite().any()
    found = weakref.ref(tokenizer)
    del tokenizer, constraint
    gc.collect()
    assert found() is None


def test_a_grammar_may_be_given_in_lark(byte_format: TextFormat, scripted: Any) -> None:
    grammar = Grammar("lark", 'start: "yes" | "no"')
    options = GenerationOptions(sampling=SamplingOptions(temperature=0.0), grammar=grammar)
    finished = list(generate(TokenSequence(scripted("nyeosx")), [5], byte_format, options))[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.text, finished.reason) == ("no", "stop")
    with pytest.raises(TorchchatError, match="grammar cannot be used"):
        check_grammar(Grammar("lark", "start: ("))
    with pytest.raises(TorchchatError, match="unknown kind of grammar 'regex'"):
        check_grammar(Grammar("regex", "a+"))


def test_200_answers_of_200_are_valid(byte_format: TextFormat) -> None:
    """A model whose every token is chance."""
    schema = {"type": "object", "required": ["a", "b"], "additionalProperties": False,
              "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
                             "b": {"type": "string", "maxLength": 6}}}
    grammar = schema_grammar(schema)
    generator = torch.Generator().manual_seed(0)

    class Chance:
        length, limit = 0, 4096

        def prefill(self, tokens: Any) -> torch.Tensor:
            self.length += len(tokens)
            return torch.rand(259, generator=generator)

        def decode(self, token: int) -> torch.Tensor:
            return self.prefill([token])

        def truncate(self, length: int) -> None:
            self.length = length

        def close(self) -> None: ...

    for seed in range(200):
        options = GenerationOptions(sampling=SamplingOptions(seed=seed, temperature=1.0), grammar=grammar)
        finished = list(generate(TokenSequence(Chance()), [5], byte_format, options))[-1]
        found = json.loads(finished.text)  # type: ignore[union-attr]
        assert set(found) == {"a", "b"}
        assert len(found["a"]) <= 4
        assert all(isinstance(each, bool) for each in found["a"])
        assert len(found["b"]) <= 6
