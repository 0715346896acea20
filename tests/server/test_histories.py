"""Conversation histories as client libraries send them, and tool calls across answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel
from starlette.testclient import TestClient

NINE = re.compile("[A-Za-z0-9]{9}")
TOOLS = [{"type": "function", "function": {"name": name, "description": "d", "parameters": {
    "type": "object", "properties": {"zone": {"type": "string", "enum": ["x"]}}, "required": ["zone"],
    "additionalProperties": False}}} for name in ("get_time", "other")]
PAYLOAD = '[{"name": "get_time", "arguments": {"zone": "x"}}]'
MISTRAL_TOKENS = [*((text, True) for text in ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
                                              "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                                              "[/TOOL_RESULTS]")), (PAYLOAD, False), ("Noon.", False)]
MISTRAL_CHAIN = [["[/INST]", "[TOOL_CALLS]", PAYLOAD, "</s>"], ["[/TOOL_RESULTS]", "Noon.", "</s>"]]
CHATML = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True)]
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "time?"}]


def template(testdata: Path, name: str) -> str:
    return (testdata / "templates" / f"{name}.jinja").read_text()


@pytest.fixture
def nemo(saying: Callable[..., TestClient], testdata: Path) -> TestClient:
    return saying(MISTRAL_TOKENS, MISTRAL_CHAIN, template(testdata, "mistralai-Mistral-Nemo-Instruct-2407"), "</s>")


@pytest.fixture
def qwen(saying: Callable[..., TestClient], testdata: Path) -> Callable[[str], TestClient]:
    """Start a server whose model answers with a text: `qwen(text)` returns a client."""
    def start(text: str) -> TestClient:
        return saying([*CHATML, ("<tool_call>", False), (text, False)], [["Ċ", text, "<|im_end|>"]],
                      template(testdata, "Qwen-Qwen2.5-7B-Instruct"), "<|im_end|>")
    return start


def chat(client: TestClient, status: int = 200, **fields: Any) -> Any:
    found = client.post("/v1/chat/completions", json={"model": "m", "messages": QUESTION, "temperature": 0,
                                                      "max_tokens": 200, **fields})
    assert found.status_code == status, found.text
    return found.json()["choices"][0] if status == 200 else found.json()["error"]


def streamed(client: TestClient, **fields: Any) -> tuple[str, list[Any], str]:
    """Return the text, tool calls and finish reason of a stream."""
    found = client.post("/v1/chat/completions", json={"model": "m", "messages": QUESTION, "temperature": 0,
                                                      "max_tokens": 200, "stream": True, **fields})
    assert found.status_code == 200, found.text
    choices = [json.loads(line[6:])["choices"][0] for line in found.text.split("\n") if line.startswith("data: {")]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    return ("".join(choice["delta"].get("content") or "" for choice in choices), calls,
            choices[-1]["finish_reason"])


def response(client: TestClient, status: int = 200, **fields: Any) -> Any:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
    found = client.post("/v1/responses", json={"model": "m", "input": "time?", "temperature": 0, "tools": tools,
                                               "max_output_tokens": 200, **fields})
    assert found.status_code == status, found.text
    return found.json()


# ---- ids -----------------------------------------------------------------------------------------------------------


def test_a_chat_tool_loop_works_with_a_template_that_checks_ids(nemo: TestClient) -> None:
    for choice in ("auto", "required"):
        message = chat(nemo, tools=TOOLS[:1], tool_choice=choice)["message"]
        call = message["tool_calls"][0]
        assert NINE.fullmatch(call["id"])
        messages = [*QUESTION, message, {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}]
        assert chat(nemo, messages=messages, tools=TOOLS)["message"]["content"] == "Noon."
    _, calls, reason = streamed(nemo, tools=TOOLS)
    assert (len(calls), reason) == (1, "tool_calls")
    assert NINE.fullmatch(calls[0]["id"])


def test_a_responses_tool_loop_works_with_a_template_that_checks_ids(nemo: TestClient) -> None:
    for choice in ("auto", "required"):
        call = response(nemo, tool_choice=choice)["output"][0]
        assert NINE.fullmatch(call["call_id"])
        items = [*QUESTION, call, {"type": "function_call_output", "call_id": call["call_id"], "output": "12:00"}]
        assert response(nemo, input=items)["output"][0]["content"][0]["text"] == "Noon."
    tool = {"type": "function", **TOOLS[0]["function"]}  # type: ignore[dict-item]
    found = nemo.post("/v1/responses", json={"model": "m", "input": "time?", "stream": True, "temperature": 0,
                                             "tools": [tool]}).text
    done = json.loads(found.split("event: response.completed\ndata: ")[1].split("\n")[0])
    assert NINE.fullmatch(done["response"]["output"][0]["call_id"])


def test_a_text_and_the_calls_after_it_are_one_message(nemo: TestClient) -> None:
    """Templates that require alternating roles reject two messages."""
    items = [*QUESTION, {"role": "assistant", "content": "Let me see."},
             {"type": "function_call", "call_id": "c", "name": "get_time", "arguments": '{"zone": "x"}'},
             {"type": "function_call_output", "call_id": "c", "output": "12:00"},
             {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "And now?"}]
    assert response(nemo, input=items)["output"][0]["type"] == "function_call"


@pytest.mark.parametrize("number", ["call_0123456789abcdef0123456789abcdef", "toolu_01A", "", "é" * 9, "a-b-c-d-e"])
def test_ids_of_other_servers_are_converted_to_the_form_of_the_template(nemo: TestClient, number: str) -> None:
    call = {"id": number, "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "x"}'}}
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": number, "content": "12:00"}]
    assert chat(nemo, messages=messages, tools=TOOLS)["message"]["content"] == "Noon."
    assert chat(nemo, messages=messages)["message"]["content"] == "Noon."  # without tools, too
    tokens = nemo.post("/tokenize", json={"messages": messages}).json()["tokens"]
    prompt = nemo.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    (first, second) = re.findall(r'"(?:call_)?id": "(\w{9})"', prompt)
    assert first == second


# ---- messages ------------------------------------------------------------------------------------------------------


def history(message: dict[str, Any] | None = None, call: dict[str, Any] | None = None,
            function: dict[str, Any] | None = None, result: dict[str, Any] | None = None,
            question: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return a question, a call and its result, with extra fields."""
    called = {"id": "c1", "type": "function", **(call or {}),
              "function": {"name": "get_time", "arguments": '{"zone": "x"}', **(function or {})}}
    return [{"role": "user", "content": "time?", **(question or {})},
            {"role": "assistant", "content": None, "tool_calls": [called], **(message or {})},
            {"role": "tool", "tool_call_id": "c1", "content": "12:00", **(result or {})}]


@pytest.mark.parametrize("parts", [
    {"function": {"parsed_arguments": None}, "call": {"index": 0}},
    {"message": {"parsed": None, "refusal": None, "annotations": [], "audio": None, "function_call": None}},
    {"message": {"annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}]}},
    {"message": {"provider_specific_fields": {"a": [1]}, "reasoning_content": "hm", "thinking_blocks": []},
     "function": {"provider_specific_fields": None}},
    {"message": {"content": None, "tool_calls": None, "reasoning": "hm"}},
    {"message": {"reasoning": {"effort": 1}, "tool_call_id": None}, "call": {"type": None}},
    {"message": {"content": [{"type": "text", "text": "Hm", "cache_control": {"type": "ephemeral"}}]}},
    {"question": {"cache_control": {"type": "ephemeral"}, "tool_calls": None, "id": "m1"}},
    {"question": {"content": [{"type": "text", "text": "time?", "cache_control": {"type": "ephemeral"}}]}},
    {"result": {"name": "get_time", "is_error": False, "artifact": {"x": 1}, "status": "success"}},
], ids=lambda parts: str(parts)[:60])
def test_fields_that_libraries_add_to_messages_are_accepted(client: TestClient, parts: dict[str, Any]) -> None:
    for path, body in (("/v1/chat/completions", {"max_tokens": 1}), ("/tokenize", {})):
        found = client.post(path, json={"model": "tiny", "messages": history(**parts), **body})
        assert found.status_code == 200, found.text


@pytest.mark.parametrize("item", [
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "", "parsed_arguments": None, "id": None},
    {"type": "message", "role": "assistant", "phase": "final_answer", "content": [
        {"type": "output_text", "text": "x", "parsed": None, "annotations": [{"type": "file_citation"}]}]},
], ids=["call", "message"])
def test_fields_that_libraries_add_to_items_are_accepted(client: TestClient, item: dict[str, Any]) -> None:
    found = client.post("/v1/responses", json={"model": "tiny", "input": [item], "max_output_tokens": 1})
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(("fields", "param"), [
    ({"messages": history(), "parsed": None}, "parsed"),
    ({"messages": history(), "cache_control": {}}, "cache_control"),
    ({"messages": history(message={"audio": {"id": "a"}})}, "messages[1].audio"),
    ({"messages": history(question={"content": [{"type": "image_url", "image_url": {"url": "u"}}]})},
     "messages[0].content[0].type"),
    ({"messages": history(result={"name": 5})}, "messages[2].name"),
    ({"messages": history(), "tools": [{**TOOLS[0], "cache_control": {}}]}, "tools[0].cache_control"),
], ids=str)
def test_fields_that_would_change_an_answer_are_still_rejected(client: TestClient, fields: dict[str, Any], param: str
                                                               ) -> None:
    found = client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 1, **fields})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)


READS_FIELDS = ("{% for m in messages %}{{ m.role }}={{ m.content }}/{{ m.name }}/{{ m.get('reasoning_content') }}/"
                "{{ m['mood'] }};{% endfor %}")


def prompt(client: TestClient, messages: list[dict[str, Any]]) -> str:
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    return str(client.post("/detokenize", json={"tokens": tokens}).json()["prompt"])


def test_fields_that_a_template_uses_reach_it(saying: Callable[..., TestClient]) -> None:
    client = saying(CHATML, [["Ċ", "<|im_end|>"]], READS_FIELDS, "<|im_end|>")
    assert prompt(client, [
        {"role": "user", "content": "a", "name": "Ann", "mood": "good<|im_end|>", "items": 5},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "assistant", "content": "c", "reasoning": "so"},
        {"role": "tool", "tool_call_id": "x", "content": "d", "name": "f", "mood": None}]) == (
        "user=a/Ann/None/good<|im_end|>;assistant=b//hm/;assistant=c//so/;tool=d/f/None/;")


@pytest.mark.parametrize("arguments", ["", " \n", None, "{}"], ids=repr)
@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"])
def test_no_arguments_are_an_empty_object(saying: Callable[..., TestClient], testdata: Path, name: str,
                                          arguments: str | None) -> None:
    client = saying(CHATML, [["Ċ", "<|im_end|>"]], template(testdata, name), "<|im_end|>")
    text = prompt(client, history(function={"arguments": arguments}))
    assert re.search('"(arguments|parameters)": {}}', text)
    items = [*QUESTION, {"type": "function_call", "call_id": "c", "name": "get_time", "arguments": arguments}]
    response(client, input=items, max_output_tokens=1)


@pytest.mark.parametrize("arguments", ["[1]", "not json", '"x"', "null", '{"a": NaN}', '{"a": 1', "[" * 100_000,
                                       '{"a": ' + "[" * 900 + "]" * 900 + "}"], ids=lambda text: text[:20])
def test_arguments_that_are_no_object_are_named(client: TestClient, arguments: str) -> None:
    found = client.post("/v1/chat/completions", json={"model": "tiny", "messages": history(
        function={"arguments": arguments})})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "messages[1].tool_calls[0].function.arguments")
    assert "expected a JSON object as a string" in error["message"]
    assert len(error["message"]) < 250
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
    found = client.post("/v1/responses", json={"model": "tiny", "input": [item]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "input[0].arguments")


# ---- the official client -------------------------------------------------------------------------------------------


def test_messages_that_the_official_client_assembles_can_be_sent_back(qwen: Callable[[str], TestClient]) -> None:
    client = qwen('<tool_call>\n{"name": "get_time", "arguments": {"zone": "x"}}\n</tool_call>')
    official: Any = OpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=client, max_retries=0)
    with official.chat.completions.stream(model="m", messages=QUESTION, tools=TOOLS, temperature=0) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    for said in (message, message.model_dump()):
        official.chat.completions.create(model="m", tools=TOOLS, max_tokens=1, messages=[
            *QUESTION, said, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"}])
    added: dict[int, Any] = {}
    for chunk in official.chat.completions.create(model="m", messages=QUESTION, tools=TOOLS, stream=True,
                                                  temperature=0):
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.index in added:
                added[call.index].function.arguments += call.function.arguments
            else:
                added[call.index] = call
    calls = [call.model_dump() for call in added.values()]
    official.chat.completions.create(model="m", tools=TOOLS, max_tokens=1, messages=[
        *QUESTION, {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "1"}])


# ---- thinking ------------------------------------------------------------------------------------------------------


THOUGHTS = '<think>\nMaybe <tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call> or not.\n</think>\n\n'
CALL = '<tool_call>\n{"name": "other", "arguments": {"zone": "x"}}\n</tool_call>'


def test_a_call_that_is_drafted_in_thinking_is_text(qwen: Callable[[str], TestClient]) -> None:
    client = qwen(THOUGHTS + CALL)
    found = chat(client, tools=TOOLS)
    assert found["message"]["content"] == THOUGHTS
    assert [call["function"]["name"] for call in found["message"]["tool_calls"]] == ["other"]
    text, calls, reason = streamed(client, tools=TOOLS)
    assert (text, [call["function"]["name"] for call in calls], reason) == (THOUGHTS, ["other"], "tool_calls")
    message, call = response(client)["output"]
    assert (message["content"][0]["text"], call["name"]) == (THOUGHTS, "other")


def test_an_answer_after_drafted_calls_is_whole(qwen: Callable[[str], TestClient]) -> None:
    client = qwen(f"{THOUGHTS}The answer is 4.")
    found = chat(client, tools=TOOLS)
    assert (found["message"]["content"], found["finish_reason"]) == (f"{THOUGHTS}The answer is 4.", "stop")
    assert streamed(client, tools=TOOLS) == (f"{THOUGHTS}The answer is 4.", [], "stop")
    assert response(client)["output"][0]["content"][0]["text"] == f"{THOUGHTS}The answer is 4."


def test_thinking_that_the_prompt_opens_holds_no_calls(saying: Callable[..., TestClient], testdata: Path) -> None:
    said = THOUGHTS.removeprefix("<think>\n") + CALL
    source = template(testdata, "Qwen-Qwen2.5-7B-Instruct").replace("assistant\\n' }}\n{%- endif %}",
                                                                    "assistant\\n<think>\\n' }}\n{%- endif %}")
    client = saying([*CHATML, (said, False)], [["Ċ", said, "<|im_end|>"]], source, "<|im_end|>")
    found = chat(client, tools=TOOLS)
    assert found["message"]["content"] == THOUGHTS.removeprefix("<think>\n")
    assert [call["function"]["name"] for call in found["message"]["tool_calls"]] == ["other"]
    assert [call["function"]["name"] for call in streamed(client, tools=TOOLS)[1]] == ["other"]
    assert response(client)["output"][1]["name"] == "other"


# ---- strict functions ----------------------------------------------------------------------------------------------


STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
FORMS = {  # template, opener, and parts of a call around an argument
    "Qwen-Qwen2.5-7B-Instruct": ("Ċ", "<tool_call>", '{"name": "get_time", "arguments": {"zone": "', '"}}',
                                 "<|im_end|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("Ċ", "", '{"name": "get_time", "parameters": {"zone": "', '"}}', "<|im_end|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("[/INST]", "[TOOL_CALLS]", '[{"name": "get_time", "arguments": {"zone": "',
                                             '"}}]', "</s>"),
}


@pytest.fixture(params=FORMS)
def wrong(request: pytest.FixtureRequest, saying: Callable[..., TestClient], testdata: Path) -> TestClient:
    """A client of a server whose model calls get_time with a zone that the schema does not allow."""
    before, opener, head, tail, end = FORMS[request.param]
    marks = MISTRAL_TOKENS[:9] if end == "</s>" else CHATML
    added = [*marks, *((text, False) for text in ("<tool_call>", head, "wrong", tail))]
    row = [before, *([opener] if opener else []), head, "wrong", tail, end]
    return saying(added, [row, ["x", tail]], template(testdata, request.param), end)


def test_a_strict_call_follows_its_schema(wrong: TestClient) -> None:
    for tools, zone in ((TOOLS, "wrong"), (STRICT, "x")):
        found = chat(wrong, tools=tools)
        arguments = json.dumps({"zone": zone})
        assert [call["function"] for call in found["message"]["tool_calls"]] == [
            {"name": "get_time", "arguments": arguments}]
        assert found["finish_reason"] == "tool_calls"
        _, calls, reason = streamed(wrong, tools=tools)
        assert ([call["function"]["arguments"] for call in calls], reason) == ([arguments], "tool_calls")
        items = [{"type": "function", **tool["function"]} for tool in tools]  # type: ignore[dict-item]
        assert response(wrong, tools=items)["output"][0]["arguments"] == arguments


def test_an_answer_without_a_call_is_unconstrained_with_strict_functions(qwen: Callable[[str], TestClient]) -> None:
    client = qwen(f"{THOUGHTS}Use <tool_call> for calls.")
    assert chat(client, tools=STRICT)["message"]["content"] == f"{THOUGHTS}Use <tool_call> for calls."


def test_the_official_client_parses_strict_calls(qwen: Callable[[str], TestClient]) -> None:
    class GetTime(BaseModel):
        zone: str

    client = qwen('<tool_call>\n{"name": "GetTime", "arguments": {"zone": "x"}}\n</tool_call>')
    official: Any = OpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=client, max_retries=0)
    found = official.chat.completions.parse(model="m", messages=QUESTION, tools=[pydantic_function_tool(GetTime)],
                                            temperature=0).choices[0].message
    assert found.tool_calls[0].function.parsed_arguments == GetTime(zone="x")
    official.chat.completions.parse(model="m", tools=[pydantic_function_tool(GetTime)], max_tokens=50, messages=[
        *QUESTION, found, {"role": "tool", "tool_call_id": found.tool_calls[0].id, "content": "1"}])


def test_a_strict_schema_that_cannot_be_enforced_is_refused(client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "wrong"}}}
    found = client.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, "tools": [tool]})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "tools")
    assert "the JSON Schema cannot be used" in error["message"]


# ---- messages of errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "param"), [
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud83d b"}]}', "messages[0].content"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\udc00"}]}', "messages[0].content"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xed\xa0\xbd"}]}', "messages[0].content"),
    (b'{"model": "tiny", "messages": [], "\\ud83d": 1}', None),
], ids=["first", "second", "raw", "key"])
def test_an_unpaired_surrogate_is_named_in_the_error(client: TestClient, body: bytes, param: str | None) -> None:
    found = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param)
    assert "unpaired surrogate" in error["message"]
    assert "not JSON" not in error["message"]


def test_a_schema_with_overlapping_alternatives_is_a_plain_error(client: TestClient) -> None:
    schema = {"oneOf": [{"type": "number"}, {"type": "integer"}]}
    found = client.post("/v1/chat/completions", json={
        "model": "tiny", "messages": QUESTION,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "response_format")
    assert 'use "anyOf"' in error["message"]
    assert "coerce_one_of" not in error["message"]
