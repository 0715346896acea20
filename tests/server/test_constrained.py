"""Answers that have to be JSON, and calls of functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator, validate
from openai import OpenAI
from starlette.testclient import TestClient

from torchchat_core.constraints import schema_grammar
from torchchat_core.errors import TorchchatError
from torchchat_core.tool_schemas import forced_schema

SCHEMA = {
    "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 12},
                   "age": {"type": "integer", "minimum": 0, "maximum": 120},
                   "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {
    "type": "object", "required": ["city"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Rome", "Oslo"]}}}}},
    {"type": "function", "function": {"name": "time"}}]


def chat(client: TestClient, **fields: Any) -> Any:
    found = client.post("/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, **fields})
    assert found.status_code == 200, found.text
    return found.json()


def test_every_answer_to_a_schema_is_valid(client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answered = [choice for seed in (1, 2) for choice in chat(client, response_format=form, n=100, seed=seed,
                                                             temperature=1.5)["choices"]]
    assert {choice["finish_reason"] for choice in answered} == {"stop"}
    texts = [choice["message"]["content"] for choice in answered]
    assert len(texts) == 200
    assert len(set(texts)) > 100
    for text in texts:
        validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("schema", [
    {"type": "number", "exclusiveMinimum": 5, "exclusiveMaximum": 5.5},
    {"type": "object", "required": ["share"], "additionalProperties": False,
     "properties": {"share": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}},
    {"allOf": [{"type": "number", "exclusiveMaximum": 0}, {"minimum": -0.001}]},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6, "multipleOf": 5},
], ids=str)
def test_bounds_that_are_excluded_are_not_reached(schema: dict[str, Any], client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = chat(client, response_format=form, n=60, seed=1, temperature=1.5)
    answered = [choice["message"]["content"] for choice in found["choices"] if choice["finish_reason"] == "stop"]
    assert answered
    for text in answered:
        validate(json.loads(text), schema)


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "integer", "minimum": -1e300, "maximum": -1e300}, "imum is -1e.300"),
    ({"anyOf": [{"items": {"type": "integer", "minimum": -(1 << 63), "maximum": -(1 << 63)}}]}, "beyond 2.53"),
    ({"type": "integer", "multipleOf": 99999989}, "multipleOf is 99999989"),
    ({"allOf": [{"type": "integer", "multipleOf": each} for each in (997, 991, 983)]}, "multipleOf is .*together"),
    ({"$ref": "#/x/y/0", "x": {"y": [{"type": "integer", "multipleOf": 99999989}]}}, "multipleOf is 99999989"),
    ({"anyOf": [{"$ref": "#/properties/x/%64efault"}],
      "properties": {"x": {"default": {"type": "integer", "minimum": -1e300, "maximum": -1e300}}}}, "leads into"),
], ids=str)
def test_a_schema_that_would_take_too_much_is_refused_at_once(schema: dict[str, Any], words: str, client: TestClient
                                                               ) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    found = client.post("/v1/chat/completions", json={**body, "response_format": form})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "response_format")
    assert re.search(words, found.json()["error"]["message"])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"],
                                                                         "properties": {"a": schema}}}}
    found = client.post("/v1/chat/completions", json={**body, "tools": [tool], "tool_choice": "required"})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tools")


def test_a_property_may_have_the_name_of_a_bound() -> None:
    schema = {"type": "object", "properties": {"minimum": {"const": 1e300}, "exclusiveMinimum": {"type": "string"}},
              "enum": [{"minimum": 1e300}], "default": {"multipleOf": 99999989}}
    assert json.loads(schema_grammar(schema).source) == schema


def test_references_lead_to_schemas_of_any_name_and_not_to_data() -> None:
    schema = {"$ref": "#/$defs/default", "$defs": {"default": {"type": "integer"}}, "examples": [{"$ref": "#/default"}]}
    assert json.loads(schema_grammar(schema).source) == schema
    for literal in ("const", "enum", "default", "examples"):
        with pytest.raises(TorchchatError, match=f"leads into '{literal}', which holds data"):
            schema_grammar({"$ref": f"#/{literal}/0", literal: [{"type": "integer"}]})


def test_multiples_that_the_last_digits_show_are_enforced() -> None:
    for multiple in (0.01, 1_000_000, 500, 9973):
        schema_grammar({"type": "number", "multipleOf": multiple})


def test_what_an_answer_says_can_be_said_to_the_model_again(client: TestClient) -> None:
    """As programs do it that call functions."""
    official = OpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=client, max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    weather: Any = {"type": "function", "function": {"name": "weather"}}
    said = official.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, tool_choice=weather,
                                            parallel_tool_calls=False, seed=1).choices[0].message
    assert said.tool_calls
    messages += [said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}]
    again = official.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=3).choices[0]
    assert again.message.content is not None
    messages[1] = said.model_dump()
    official.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=3)
    first = official.responses.create(model="tiny", input="Hi", max_output_tokens=3)
    official.responses.create(model="tiny", input=[*(each.model_dump() for each in first.output),
                                                   {"role": "user", "content": "Go on"}], max_output_tokens=3)


@pytest.mark.parametrize(("item", "param"), [
    ({"type": "function_call", "call_id": "1", "name": "bad name!", "arguments": "{}"}, "input[0].name"),
    ({"type": "function_call_output", "call_id": "1", "output": 5}, "input[0].output"),
    ({"type": "reasoning"}, "input[0]"),
    ({"role": "nobody", "content": "x"}, "input[0].role"),
], ids=str)
def test_what_is_wrong_in_an_item_is_named(item: dict[str, Any], param: str, client: TestClient) -> None:
    found = client.post("/v1/responses", json={"model": "tiny", "input": [item]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)


def test_a_json_object_is_one(client: TestClient) -> None:
    found = chat(client, response_format={"type": "json_object"}, seed=3, logit_bias={"5": 50}, n=4)
    for choice in found["choices"]:
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        else:
            assert choice["message"]["content"].startswith("{")


def test_what_a_schema_cannot_demand_is_refused(client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    found = client.post("/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "response_format": form})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "response_format"
    assert "uniqueItems" in found.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_demanded_call_is_one_with_valid_arguments(client: TestClient, choice: Any) -> None:
    tools = TOOLS[:1]
    found = chat(client, tools=tools, tool_choice=choice)["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    call = found["message"]["tool_calls"][0]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")


def test_a_demanded_call_keeps_to_schemas_with_definitions_of_their_own(client: TestClient) -> None:
    city = {"type": "object", "required": ["city"], "additionalProperties": False,
            "properties": {"city": {"$ref": "#/$defs/place"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": {
        **city, "$defs": {"place": {"enum": places}}}}} for name, places in (("go.to", ["Rome"]), ("leave", ["Oslo"]))]
    for count in (1, 2):
        answered = chat(client, tools=tools[:count], tool_choice="required", n=6)["choices"]
        calls = [choice["message"]["tool_calls"][0]["function"] for choice in answered]
        for call in calls:
            assert json.loads(call["arguments"]) == {"city": "Rome" if call["name"] == "go.to" else "Oslo"}


def test_schemas_with_names_and_anchors_of_their_own_are_kept_apart() -> None:
    named = {"$id": "https://example.org/a", "type": "object", "required": ["x"], "properties": {
        "x": {"$ref": "#/$defs/kind"}, "y": {"$ref": "https://example.org/a#/$defs/kind"}}, "$defs": {
            "kind": {"type": "string"}}}
    first, second = ({"type": "object", "required": ["x"], "properties": {"x": {"$ref": "#kind"}}, "$defs": {
        "a/b c": {"$anchor": "kind", "type": kind}}} for kind in ("string", "integer"))
    old = {"type": "object", "required": ["x"], "properties": {"x": {"$ref": "#kind"}}, "definitions": {
        "k": {"$id": "#kind", "type": "boolean"}}}
    inner = {"type": "object", "required": ["x"], "properties": {"x": {"$ref": "https://example.org/b"}}, "$defs": {
        "b": {"$id": "https://example.org/b", "$ref": "#/$defs/c", "$defs": {"c": {"type": "null"}}}}}
    functions = {"named": named, "again": named, "first": first, "second": second, "old": old, "inner": inner}
    whole = forced_schema("arguments", functions)
    schema_grammar(whole)
    values = {"named": "s", "again": "s", "first": "s", "second": 1, "old": True, "inner": None}
    for name, right in values.items():
        for value in values.values():
            call = {"name": name, "arguments": {"x": value}}
            assert Draft202012Validator(whole).is_valid(call) == (type(value) is type(right)), call


def test_what_looks_like_a_pointer_in_data_or_names_stays(client: TestClient) -> None:
    schema = {"type": "object", "required": ["$ref"], "additionalProperties": False,
              "properties": {"$ref": {"const": "#/x"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    call = chat(client, tools=[tool], tool_choice="required")["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"$ref": "#/x"}


def test_a_streamed_call_comes_whole(client: TestClient) -> None:
    found = client.post("/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "tools": TOOLS[:1],
        "tool_choice": "required", "stream": True})
    chunks = [json.loads(line[6:]) for line in found.text.split("\n") if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_response_has_a_demanded_call_as_an_item(client: TestClient) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}
    found = client.post("/v1/responses", json={"model": "tiny", "input": "Hi", "tools": [tool],
                                               "tool_choice": "required"}).json()
    assert [item["type"] for item in found["output"]] == ["function_call"]
    assert found["output"][0]["name"] == "weather"


def test_tools_stand_in_the_prompt_and_results_go_back(client: TestClient) -> None:
    called = {"name": "weather", "arguments": "{\"city\":\"Rome\"}"}
    messages = [{"role": "user", "content": "Hi"},
                {"role": "assistant", "content": None,
                 "tool_calls": [{"id": "c1", "type": "function", "function": called}]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"}]
    tokens = client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '"name": "weather"' in text
    assert '{"city": "Rome"}' in text
    assert text.endswith("tool: sunnyassistant: ")


def test_a_model_without_tools_refuses_them(stories: TestClient) -> None:
    found = stories.post("/v1/chat/completions", json={
        "model": "stories", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tools")


def test_generate_takes_a_schema(torchchat: Callable[..., Any], chat_model: Any, tmp_path: Any) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    found = torchchat("generate", chat_model, "--prompt", "Hi", "--json-schema", tmp_path / "schema.json", "--json",
                      "--seed", "5")
    assert found.code == 0, found.err
    validate(json.loads(json.loads(found.out)["text"]), SCHEMA)
    (tmp_path / "schema.json").write_text('{"type": "wrong"}')
    found = torchchat("generate", chat_model, "--prompt", "Hi", "--json-schema", tmp_path / "schema.json")
    assert found.code == 1
    assert "the JSON Schema cannot be used" in found.err


def test_an_answer_that_has_to_be_json_cannot_choose_to_call(client: TestClient) -> None:
    sent = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "max_tokens": 200,
            "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}}
    found = client.post("/v1/chat/completions", json=sent)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "response_format")
    assert client.post("/v1/chat/completions", json={**sent, "tool_choice": "none"}).status_code == 200
