"""Tool calls in answers: the form that the template defines, and how answers are parsed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.template_limits import stopped
from torchchat_core.tool_calls import (
    FUNCTION_JSON,
    GRANITE,
    HERMES,
    LLAMA3,
    MISTRAL,
    QWEN_XML,
    ToolCall,
    ToolCallReader,
    ToolForm,
)
from torchchat_core.tool_profiles import tool_profile
from torchchat_core.tool_schemas import typed_value

CALLS = [ToolCall("weather", '{"city": "Rome"}'), ToolCall("time", "{}")]


@pytest.mark.parametrize(("form", "text", "content", "calls"), [
    (HERMES, 'Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>'
             '{"name": "time", "arguments": {}}</tool_call>', "Wait.\n", CALLS),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time"}]', "", CALLS),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]time[ARGS]{}', "", CALLS),
    (LLAMA3, '{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "time", "parameters": {}}', "", CALLS),
    (LLAMA3, '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', "", CALLS[:1]),
    (GRANITE, '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]', "", CALLS[:1]),
    (QWEN_XML, "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>", "",
     CALLS[:1]),
    (HERMES, "a < b, and <tool is no call", "a < b, and <tool is no call", []),
    (HERMES, '<tool_call>{"name": "weather", "argum', '<tool_call>{"name": "weather", "argum', []),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', []),
    (LLAMA3, 'It is {"name": "weather"}', 'It is {"name": "weather"}', []),
    (LLAMA3, '{"just": "JSON"}', '{"just": "JSON"}', []),
], ids=lambda value: getattr(value, "name", None) or str(value)[:20])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_found_in_chunks_of_any_size(form: Any, text: str, content: str, calls: list[ToolCall], size: int
                                               ) -> None:
    reader = ToolCallReader(form, {"weather": None, "time": None})
    said = "".join(reader.push(text[start : start + size]) for start in range(0, len(text), size))
    rest, found = reader.finish()
    assert found == calls
    assert said + rest == content



DRAFT = ('<think>\nMaybe <tool_call>\n{"name": "f", "arguments": {"a": "draft"}}\n</tool_call> or g.\n</think>\n\n',
         '<tool_call>\n{"name": "g", "arguments": {"a": "real"}}\n</tool_call>')
ANSWERS = [  # what a model says, its text, and its calls
    ("".join(DRAFT), DRAFT[0], [ToolCall("g", '{"a": "real"}')]),
    (f"{DRAFT[0]}The answer is 4.", f"{DRAFT[0]}The answer is 4.", []),
    (DRAFT[0].replace("</think>\n\n", ""), DRAFT[0].replace("</think>\n\n", ""), []),
    ('<think>\nI call <tool_call> now\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>',
     "<think>\nI call <tool_call> now\n</think>\n\n", [ToolCall("f", '{"a": "b"}')]),
    ('I will use the <tool_call> format:\n<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>',
     "I will use the <tool_call> format:\n", [ToolCall("f", '{"a": "b"}')]),
    ('<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>\nand\n'
     '<tool_call>\n{"name": "g", "arguments": {"a": "y"}}\n</tool_call>',
     "\nand\n", [ToolCall("f", '{"a": "x"}'), ToolCall("g", '{"a": "y"}')]),
    ('\n<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>\n<think>or\n</think>\n'
     '<tool_call>\n{"name": "g", "arguments": {"a": "y"}}\n</tool_call>\n',
     "\n<think>or\n</think>\n", [ToolCall("f", '{"a": "x"}'), ToolCall("g", '{"a": "y"}')]),
    ('Say <think> first. <tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>', "Say <think> first. ",
     [ToolCall("f", '{"a": "x"}')]),
    ('<tool_call> {"broken <tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>', '<tool_call> {"broken ',
     [ToolCall("f", '{"a": "x"}')]),
]


def in_xml(text: str) -> str:
    return re.sub(r'\{"name": "(\w)", "arguments": \{"a": "(\w+)"\}\}',
                  r"<function=\1>\n<parameter=a>\n\2\n</parameter>\n</function>", text)


def read(form: ToolForm, text: str, size: int, thinking: str | None = None) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader(form, {"f": None, "g": None}, thinking)
    said = "".join(reader.push(text[start : start + size]) for start in range(0, len(text), size))
    rest, calls = reader.finish()
    return said + rest, calls


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS, ids=range(len(ANSWERS)))
def test_calls_inside_thinking_and_mentions_of_calls_are_text(text: str, content: str, calls: list[ToolCall], size: int
                                                              ) -> None:
    assert read(HERMES, text, size) == (content, calls)
    assert read(QWEN_XML, in_xml(text), size) == (in_xml(content), calls)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_thinking_that_the_prompt_opens_ends_with_its_mark(size: int) -> None:
    text, content, calls = ANSWERS[0]
    assert read(HERMES, text.removeprefix("<think>\n"), size, "<think>") == (content.removeprefix("<think>\n"), calls)
    assert read(HERMES, "never ends <tool_call>{}", size, "<think>") == ("never ends <tool_call>{}", [])


DEEP = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 900 + "]" * 900 + "}}"


@pytest.mark.parametrize(("form", "text", "content", "names"), [
    (FUNCTION_JSON, 'Now <function=f>{"a": "</function>"}</function>\n<function=g>{}</function>', "Now ", "fg"),
    (FUNCTION_JSON, 'Use <function=NAME>, as in <function=h>{"a": 1}</function>.',
     'Use <function=NAME>, as in <function=h>{"a": 1}</function>.', ""),
    (QWEN_XML, "<function=f>\n<parameter=a>\n</function>\n</parameter>\n</function>", "", "f"),
    (MISTRAL, 'After [TOOL_CALLS] come calls. [TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}',
     "After [TOOL_CALLS] come calls. ", "f"),
    (LLAMA3, '{"name": "f", "parameters": {}} is a call.', " is a call.", "f"),
    (LLAMA3, '<|python_tag|> is a token', "<|python_tag|> is a token", ""),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
     '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', ""),
    (HERMES, DEEP, DEEP, ""),
], ids=lambda value: str(getattr(value, "name", value))[:40])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_forms_are_read_to_the_end_of_their_calls(form: ToolForm, text: str, content: str, names: str, size: int
                                                  ) -> None:
    said, calls = read(form, text, size)
    assert (said, "".join(call.name for call in calls)) == (content, names)


def test_text_that_is_not_a_call_is_not_parsed_repeatedly() -> None:
    """The work is bounded, however many openers without a call an answer has."""
    for text in ('<tool_call>{"a":"', "<tool_call>", "<tool_call>{", "<function=f><parameter=a>", "<think>"):
        for form in (HERMES, QWEN_XML, LLAMA3):
            assert read(form, text * 5000, len(text) * 5000) == (text * 5000, [])


QWEN_CODER = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.first and tools %}{{ tools[0].function.name }}: <tool_call>
<function=example>
<parameter=p>
v
</parameter>
</function>
</tool_call>{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}
<tool_call>
<function={{ c.function.name }}>
{% for k, v in c.function.arguments|items %}<parameter={{ k }}>
{{ v | string }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
FUNCTIONARY = """{% if tools %}<|start_header_id|>system<|end_header_id|>

Write <function=example>{"name": "parameters"}</function>: {{ tools | tojson }}<|eot_id|>{% endif %}{% for m in
messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' + c.function.arguments +
'</function>' }}{% endfor %}<|eot_id|>{% endfor %}"""
NULL_CONTENT = """{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}<tool_call>{"name": "{{
c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{% else %}{{ m.content }}
{% endif %}{% endfor %}{{ tools }}"""
LEAVES_CALLS_OUT = "{{ tools }}<|tool_call|>{% for m in messages %}{{ m.content }}{% endfor %}"
OTHER_FORM = """{{ tools }}<tool_call>{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments|items %}<arg_key>{{ k }}</arg_key>{{ v }}{%
endfor %}</tool_call>{% endfor %}{% endfor %}"""


def profile_of(source: str) -> Any:
    return tool_profile(ChatTemplate(source, bos_token="<s>", eos_token="</s>"))


@pytest.mark.parametrize(("file", "form"), [
    ("Qwen-Qwen2.5-7B-Instruct", HERMES), ("meta-llama-Llama-3.1-8B-Instruct", LLAMA3),
    ("meta-llama-Llama-3.2-3B-Instruct", LLAMA3), ("mistralai-Mistral-Nemo-Instruct-2407", MISTRAL),
    ("google-gemma-2-2b-it", None), ("microsoft-Phi-3.5-mini-instruct", None),
])
def test_the_form_is_read_from_the_template(testdata: Path, file: str, form: Any) -> None:
    profile = profile_of((testdata / "templates" / f"{file}.jinja").read_text())
    assert profile.form is form
    assert profile.short_ids is (form is MISTRAL)
    assert not profile.text_arguments


@pytest.mark.parametrize(("source", "form", "text_arguments", "null_content"), [
    (QWEN_CODER, QWEN_XML, False, False), (FUNCTIONARY, FUNCTION_JSON, True, False),
    (NULL_CONTENT, HERMES, False, True), (LEAVES_CALLS_OUT, GRANITE, False, False), (OTHER_FORM, None, False, False),
    ("{{ messages[0].content }}", None, False, False), ("{{ tools }}{{ raise_exception('no') }}", None, False, False),
], ids=["coder", "functionary", "null", "left out", "other", "no tools", "fails"])
def test_a_form_that_cannot_parse_the_templates_own_call_is_not_used(source: str, form: Any, text_arguments: bool,
                                                                     null_content: bool) -> None:
    profile = profile_of(source)
    assert (profile.form, profile.text_arguments, profile.null_content) == (form, text_arguments, null_content)


def test_an_endless_template_is_not_probed_repeatedly(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ tools }}", bos_token=None, eos_token=None)
    tries: list[object] = []

    def render(_self: ChatTemplate, messages: object, **_variables: Any) -> str:
        tries.append(messages)
        raise stopped("it took too long")

    monkeypatch.setattr(ChatTemplate, "render", render)
    assert tool_profile(template).form is tool_profile(template).form is None
    assert len(tries) <= 3


def test_ids_get_the_form_that_a_template_demands() -> None:
    demanding = profile_of("{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
                           "{% if c.id|length != 9 %}{{ raise_exception('nine') }}{% endif %}<tool_call>{{ "
                           "c.function | tojson }}</tool_call>{% endfor %}{% endfor %}")
    assert demanding.form is HERMES
    assert re.fullmatch("[A-Za-z0-9]{9}", demanding.new_id())
    assert demanding.template_id("a1B2c3D4e") == "a1B2c3D4e"
    assert demanding.template_id("call_1") == demanding.template_id("call_1") != demanding.template_id("call_2")
    assert re.fullmatch("[A-Za-z0-9]{9}", demanding.template_id(""))
    other = profile_of(QWEN_CODER)
    assert other.template_id("call_1") == "call_1"
    assert re.fullmatch("call_[0-9a-f]{32}", other.new_id())


def test_unquoted_values_get_the_types_of_the_schema() -> None:
    schema = {"properties": {
        "text": {"type": "string"}, "count": {"type": "integer"}, "flag": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "named": {"$ref": "#/$defs/named"}, "any": {}},
        "$defs": {"named": {"enum": ["1", "2"]}}}
    for name, text, value in [("text", "123", "123"), ("text", "{}", "{}"), ("count", "123", 123),
                              ("count", "many", "many"), ("flag", "True", True), ("flag", "false", False),
                              ("maybe", "null", None), ("maybe", "5", "5"), ("named", "1", "1"), ("any", "1", 1),
                              ("any", "x", "x"), ("other", '["a"]', ["a"])]:
        assert typed_value(text, name, schema) == value, (name, text)
