"""Strict tool calls are constrained by their schemas; other text is not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchchat_core.constraints import CallConstraint, check_grammar
from torchchat_core.errors import TorchchatError
from torchchat_core.testing.models import TinyTokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tool_calls import FORMS, FUNCTION_JSON, GRANITE, HERMES, LLAMA3, MISTRAL, QWEN_XML, ToolForm
from torchchat_core.tool_grammars import call_grammar

FUNCTIONS: dict[str, dict[str, Any] | None] = {
    "weather": {"type": "object", "required": ["city", "days"], "additionalProperties": False, "properties": {
        "city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}, "note": {"type": "string", "maxLength": 3}}},
    "free": None,
}
END = 1  # </s>


def constraint(form: ToolForm, text_format: TextFormat, thinking: str | None = None,
               functions: dict[str, dict[str, Any] | None] = FUNCTIONS) -> CallConstraint:
    calls = call_grammar(form, functions, text_format.tokenizer)
    check_grammar(calls.grammar)
    return CallConstraint(replace(calls, thinking=thinking), text_format)


def refused_at(found: CallConstraint, text: str) -> int | None:
    """Return the offset of the first byte that is not allowed, or None if the text and its end are allowed."""
    for index, token in enumerate([*TinyTokenizer().encode(text), END]):
        logits = found.apply(torch.zeros(TinyTokenizer.vocab_size))
        if not math.isfinite(logits[token]):
            return index
        if token != END:
            found.accept(token)
    return None


OBJECT = '{"city": "Rome", "days": 3}'
CALLS = [  # a call of each form, with its arguments
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'),
    (HERMES, '<tool_call>{"name": "free", "arguments": {"a": 1}}</tool_call>'
             '<tool_call>{"name": "weather", "arguments": %s}</tool_call>'),
    (HERMES, '<tool_call>{"name": "free", "arguments": {}}\n{"name": "weather", "arguments": %s}</tool_call>'),
    (FUNCTION_JSON, "Now <function=weather>%s</function>"),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": %s, "id": "a1b2c3d4e"}]'),
    (MISTRAL, '[TOOL_CALLS][{"name": "free", "arguments": {}}, {"name": "weather", "arguments": %s}]'),
    (MISTRAL, "[TOOL_CALLS]weather[ARGS]%s"),
    (MISTRAL, "[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]%s[TOOL_CALLS]free[ARGS]{}"),
    (LLAMA3, '{"name": "weather", "parameters": %s}'),
    (LLAMA3, '<|python_tag|>{"name": "weather", "parameters": %s}; {"name": "free", "parameters": {}}'),
    (GRANITE, '<|tool_call|>[{"name": "weather", "arguments": %s}]'),
]


@pytest.mark.parametrize(("form", "call"), CALLS, ids=lambda value: str(getattr(value, "name", value))[:40])
def test_arguments_of_a_call_follow_the_schema(byte_format: TextFormat, form: ToolForm, call: str) -> None:
    assert refused_at(constraint(form, byte_format), f"{call % OBJECT}\nDone.") is None
    for wrong in ('{"city": "P', '{"days": 3', '{"city": "Rome"}', '{"city": "Rome", "days": "',
                  '{"city": "Rome", "days": 3, "x"'):
        start = call.index("%s")
        at = refused_at(constraint(form, byte_format), call[:start] + wrong)
        assert at is not None
        assert start < at < start + len(wrong)


@pytest.mark.parametrize("text", [
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n"
    "</tool_call>",
    "<function=weather><parameter=city>Oslo</parameter><parameter=days>-1</parameter><parameter=note>\nabc\n</parameter>"
    "</function>",
    "<tool_call>\n<function=free>\n<parameter=any>\n<b>\n\n</parameter>\n</function>\n</tool_call>\nDone.",
])
def test_the_xml_form_is_constrained_where_possible(byte_format: TextFormat, text: str) -> None:
    assert refused_at(constraint(QWEN_XML, byte_format), text) is None


@pytest.mark.parametrize(("text", "refused"), [
    ("<function=weather>\n<parameter=days", "d"),
    ("<function=weather>\n<parameter=city>\nParis", "P"),
    ("<function=weather><parameter=city>Rome</parameter></function", "/"),
    ("<function=weather><parameter=city>Rome</parameter><parameter=days>many", "m"),
    ("<function=weather><parameter=city>Rome</parameter><parameter=days>1</parameter><parameter=note>abcd", "d"),
    ("<function=weather><parameter=city>Rome</parameter><parameter=days>1</parameter><parameter=x", "x"),
])
def test_text_that_violates_a_schema_is_rejected_in_the_xml_form(byte_format: TextFormat, text: str, refused: str
                                                                 ) -> None:
    at = refused_at(constraint(QWEN_XML, byte_format), text)
    assert at is not None
    assert at == text.rindex(refused)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_text_around_calls_is_unconstrained(byte_format: TextFormat, form: ToolForm) -> None:
    for text in ("", "Hello.", f"The mark {form.openers[0]} begins a call", f"Say {form.openers[0]}", '[1, {"a": 2}]',
                 f"<think>\n{form.openers[0]}{{\"name\": 5\n</think>\nNo."):
        assert refused_at(constraint(form, byte_format), text) is None, text
    opened = f"{form.openers[0]}{{\"name\": 5\n</think>\nNo."
    assert refused_at(constraint(form, byte_format, "<think>"), opened) is None


def test_an_answer_can_be_any_object_if_calls_have_no_opener(byte_format: TextFormat) -> None:
    for text in ('{"city": "Rome"}', '{"name": "Ann", "age": 5}', "{}"):
        assert refused_at(constraint(LLAMA3, byte_format), text) is None
    for text in ('{"type": "function", "name": "x', '{"name": "weather", "x'):
        assert refused_at(constraint(LLAMA3, byte_format), text) is not None


def test_marks_that_are_control_tokens_stand_in_calls() -> None:
    class Tokens(TinyTokenizer):
        special_tokens = {"[TOOL_CALLS]": 0, "</s>": 1, "[ARGS]": 2}  # noqa: RUF012
        bos_id = None

    text_format = TextFormat(Tokens(), None, frozenset({1}), {})
    found = constraint(MISTRAL, text_format)
    for token in [0, *Tokens().encode("weather"), 2, *Tokens().encode('{"city": "Oslo", "days": 2}'), 0]:
        assert math.isfinite(found.apply(torch.zeros(Tokens.vocab_size))[token])
        found.accept(token)
    for token in Tokens().encode("nothing"):
        found.accept(token)
    assert math.isfinite(found.apply(torch.zeros(Tokens.vocab_size))[1])


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"a>b": {}}}, {"anyOf": [{"type": "object"}]},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1e300}}},
])
def test_a_schema_that_the_xml_form_cannot_express_is_refused(byte_format: TextFormat, schema: dict[str, Any]) -> None:
    with pytest.raises(TorchchatError):
        call_grammar(QWEN_XML, {"f": schema}, byte_format.tokenizer)


def test_a_schema_with_definitions_is_kept_in_every_form(byte_format: TextFormat) -> None:
    schema = {"$ref": "#/$defs/root", "$defs": {
        "root": {"type": "object", "required": ["days", "kind"], "additionalProperties": False, "properties": {
            "days": {"$ref": "#/$defs/days"}, "kind": {"$ref": "#/$defs/kind"}}},
        "days": {"type": "array", "items": {"type": "integer"}}, "kind": {"enum": ["a/b", 'c"d']}}}
    functions = {"f": schema}
    for form, call in ((HERMES, '<tool_call>{"name": "f", "arguments": {"days": [1], "kind": "a/b"}}</tool_call>'),
                       (QWEN_XML, "<function=f>\n<parameter=days>\n[1]\n</parameter>\n"
                                  "<parameter=kind>\nc\"d\n</parameter>\n</function>")):
        assert refused_at(constraint(form, byte_format, functions=functions), call) is None
        assert refused_at(constraint(form, byte_format, functions=functions), call.replace("[1]", "[x]")) is not None
