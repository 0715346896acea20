"""What is refused, with which status, and what the error names."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from torchchat_core.batching import Batch
from torchchat_core.server import app
from torchchat_core.server.errors import ApiError, malformed
from torchchat_core.server.exchange import EventStream

PATIENCE = 60.0  # seconds, on a busy machine
MESSAGES = [{"role": "user", "content": "Hi"}]


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **fields})


@pytest.mark.parametrize(("fields", "param"), [
    ({"unheard_of": 1}, "unheard_of"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"store": True}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"functions": []}, "functions"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant"}]}, "messages"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "no good name"}}]}, "tools[0].function.name"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}},
     "response_format"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [10**400]}}}]},
     "tools[0].function.parameters"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
], ids=lambda value: str(value)[:50])
def test_a_field_that_cannot_be_honoured_is_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    found = post(client, **fields)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize(("body", "message"), [
    (b"{", "not JSON"), (b"", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"),
    (b"[]", "the body"), (b"null", "the body"), (b'{"model": NaN}', "model"),
], ids=lambda value: str(value)[:20])
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: bytes, message: str) -> None:
    found = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


def test_a_form_is_refused_before_it_is_read(client: TestClient) -> None:
    found = client.post("/v1/completions", data={"model": "tiny"})
    assert found.status_code == 415
    assert "Content-Type: application/json" in found.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "identity, br", "x" * 300])
def test_an_encoded_body_is_refused(client: TestClient, encoding: str) -> None:
    found = client.post("/v1/completions", content=b"\x1f\x8b",
                        headers={"content-type": "application/json", "content-encoding": encoding})
    assert found.status_code == 415
    message = found.json()["error"]["message"]
    assert "Content-Encoding: " in message
    assert "send it without an encoding" in message
    assert len(message) < 200


def test_a_body_with_the_encoding_identity_is_read(client: TestClient) -> None:
    found = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1},
                        headers={"content-encoding": "Identity"})
    assert found.status_code == 200


@pytest.mark.parametrize(("path", "fields", "param", "count"), [
    ("/v1/completions", {"prompt": ["a"] * 100_000}, "prompt", "100000 elements; at most 2048"),
    ("/v1/completions", {"prompt": [[1]] * 5000}, "prompt", "5000 elements; at most 2048"),
    ("/v1/embeddings", {"input": ["a"] * 5000}, "input", "5000 elements; at most 2048"),
    ("/v1/completions", {"prompt": "a", "stop": ["a"] * 17}, "stop", "17 elements; at most 16"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 16_385}]},
     "messages[0].content", "16385 elements; at most 16384"),
], ids=["texts", "lists of tokens", "embeddings", "stop", "content"])
def test_a_list_that_is_too_long_is_refused_for_its_length(client: TestClient, path: str, fields: dict[str, Any],
                                                           param: str, count: str) -> None:
    found = client.post(path, json={"model": "tiny", **fields})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: it has {count}")


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/a.json", "file:///etc/passwd", "other.json#/$defs/a",
                                    "//host/a", "urn:a:b", "http://a/" + "b" * 500])
def test_references_to_other_documents_are_refused(client: TestClient, target: str) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": target}}}
    found = post(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert found.status_code == 400
    message = found.json()["error"]["message"]
    assert "leads to another document" in message
    assert "retriev" not in message
    assert target[:61] not in message or len(target) < 61


def test_an_absolute_reference_within_the_schema_is_accepted(client: TestClient) -> None:
    schema = {"$id": "http://host/root", "type": "object", "properties": {"a": {"$ref": "http://host/root#/$defs/b"}},
              "$defs": {"b": {"type": "string"}}}
    found = post(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert found.status_code == 200


def test_a_body_of_no_type_is_refused_since_any_page_may_send_it(client: TestClient) -> None:
    found = client.post("/v1/completions", content=b'{"model": "tiny", "prompt": "x", "max_tokens": 1}')
    assert found.status_code == 415


def test_a_local_server_is_for_pages_of_this_machine_and_those_that_are_named(chat_model: Path,
                                                                              serve: Callable[..., Any]) -> None:
    def status(client: TestClient, **headers: str) -> int:
        return int(client.get("/v1/models", headers=headers).status_code)

    with serve({"tiny": chat_model}, local=True, origins=["https://page.example"]) as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "page.example:443"):
            assert status(client, host=host) == 200
        for host in ("evil.example:8000", "localhost.evil.example", "testserver", "", "127.0.0.1.evil.example:80"):
            assert status(client, host=host) == 403
        for origin in ("http://localhost:3000", "https://page.example"):
            assert status(client, host="localhost:8000", origin=origin) == 200
        for origin in ("https://evil.example", "null", "https://page.example.evil.example"):
            assert status(client, host="localhost:8000", origin=origin) == 403
    with serve({"tiny": chat_model}, local=True, origins=["*"]) as client:
        assert status(client, host="anything", origin="https://evil.example") == 200


def test_a_model_that_is_not_here_is_404(client: TestClient) -> None:
    for found in (client.get("/v1/models/timy"), post(client, model="timy")):
        assert found.status_code == 404
        assert found.json()["error"]["code"] == "model_not_found"
        assert "did you mean tiny?" in found.json()["error"]["message"]


@pytest.mark.parametrize(("path", "method", "status"), [("/nowhere", "GET", 404), ("/v1/completions", "GET", 405),
                                                        ("/health", "POST", 405)])
def test_wrong_addresses_get_the_same_kind_of_body(client: TestClient, path: str, method: str, status: int) -> None:
    found = client.request(method, path)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_prompt_that_is_too_long_is_told_with_its_length(client: TestClient) -> None:
    found = client.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 2000})
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "context_length_exceeded"
    assert "2000 tokens; at most 1023" in found.json()["error"]["message"]


def test_tokens_that_the_model_does_not_have_are_refused(client: TestClient) -> None:
    for path, body in (("/v1/completions", {"model": "tiny", "prompt": [1, 999999]}),
                       ("/detokenize", {"tokens": [999999]})):
        found = client.post(path, json=body)
        assert found.status_code == 400
        assert "999999" in found.json()["error"]["message"]


def test_the_key_guards_all_but_health(chat_model: Path, serve: Callable[..., Any]) -> None:
    with serve({"tiny": chat_model}, api_key="secret") as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            found = client.get(path)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "bearer  secret"}).status_code == 200
    with serve({"tiny": chat_model}, api_key="s\u00e9cret") as client:
        assert client.get("/v1/models", headers={"Authorization": "Bearer s\u00e9cret".encode()}).status_code == 200


def test_limits_are_kept(chat_model: Path, serve: Callable[..., Any]) -> None:
    with serve({"tiny": chat_model}, max_body_bytes=2000, max_prompt_tokens=100, max_output_tokens=5, max_queue=1,
               parallel=1) as client:
        found = client.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 3000})
        assert found.status_code == 413
        found = client.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 200})
        assert (found.status_code, found.json()["error"]["param"]) == (400, "prompt")
        found = post(client, max_tokens=6)
        assert (found.status_code, found.json()["error"]["param"]) == (400, "max_tokens")
        found = client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
        assert found.json()["usage"]["completion_tokens"] <= 5
        found = post(client, n=3)
        assert (found.status_code, "at most 2 are possible" in found.text) == (400, True)


def test_who_comes_when_too_many_wait_is_told_to_come_again(
        chat_model: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step, go_on = Batch.step, threading.Event()

    def waiting(self: Batch) -> Any:
        assert go_on.wait(PATIENCE)
        return step(self)

    monkeypatch.setattr(Batch, "step", waiting)
    body = {"model": "tiny", "input": "x"}
    with serve({"tiny": chat_model}, max_queue=1, parallel=1) as client, ThreadPoolExecutor(1) as pool:
        long = pool.submit(post, client, n=2, max_tokens=200, logit_bias={"0": -100, "1": -100})
        while "torchchat_answers_in_progress 2" not in client.get("/metrics").text and not long.done():
            time.sleep(0.01)
        for found in (post(client), client.post("/v1/embeddings", json=body)):
            assert (found.status_code, found.headers["retry-after"]) == (429, "1")
        go_on.set()
        assert long.result().status_code == 200
        assert client.post("/v1/embeddings", json=body).status_code == 200


def limit_time(client: TestClient, seconds: float) -> None:
    """Change the time limit of a running server, so that it does not apply to loading and earlier answers."""
    served: Any = client.app
    object.__setattr__(served.state.service.limits, "max_time", seconds)


def test_embeddings_that_take_too_long_are_given_up(chat_model: Path, serve: Callable[..., Any]) -> None:
    with serve({"tiny": chat_model}) as client:
        assert post(client).status_code == 200  # loads the model
        limit_time(client, 0.3)
        found = client.post("/v1/embeddings", json={"model": "tiny", "input": [[5] * 500] * 2048})
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        limit_time(client, PATIENCE)
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 200


def test_a_client_that_reads_no_stream_does_not_keep_it(client: TestClient) -> None:
    closed: list[bool] = []

    async def events() -> AsyncIterator[str]:
        while True:
            yield "data: x\n\n"

    async def stalled(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def scenario() -> None:
        stream = EventStream(events(), lambda: closed.append(True), seconds=0.1)
        await stream({"type": "http"}, asyncio.Event().wait, stalled)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    assert closed == [True]


def test_an_answer_that_takes_too_long_is_given_up(chat_model: Path, serve: Callable[..., Any],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step

    def slow(self: Batch) -> Any:
        time.sleep(0.01)
        return step(self)

    with serve({"tiny": chat_model}) as client:
        assert post(client).status_code == 200  # loads the model
        limit_time(client, 0.05)
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", slow)
            found = post(client, max_tokens=900, logit_bias={"0": -100, "1": -100})
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        limit_time(client, PATIENCE)
        assert post(client, max_tokens=1).status_code == 200


@pytest.mark.parametrize("name", ["self", "text_format", "tools_", "variables", "messages_", "tokenizer"])
def test_variables_of_a_template_may_have_any_name(client: TestClient, name: str) -> None:
    assert post(client, chat_template_kwargs={name: "x"}).status_code == 200


@pytest.mark.parametrize(("path", "tool"), [
    ("/v1/responses", '{"type": "function", "name": "f", "parameters": {"a": [{"b": 1e999}]}}'),
    ("/v1/chat/completions", '{"type": "function", "function": {"name": "f", "parameters": {"a": -1e999}}}'),
])
def test_a_number_that_no_answer_can_repeat_is_refused(client: TestClient, path: str, tool: str) -> None:
    said = '"input": "Hi"' if path == "/v1/responses" else '"messages": [{"role": "user", "content": "Hi"}]'
    body = f'{{"model": "tiny", {said}, "tools": [{tool}]}}'
    found = client.post(path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert "not finite" in found.json()["error"]["message"]


def test_json_of_a_model_that_cannot_write_it_is_refused(testdata: Path, serve: Callable[..., Any]) -> None:
    with serve({"tiny": testdata / "hf" / "TinyStories-656K"}) as client:
        found = post(client, response_format={"type": "json_object"})
        assert found.status_code == 400
        assert "vocabulary has no token" in found.json()["error"]["message"]


@pytest.mark.parametrize(("path", "fields"), [
    ("/v1/completions", {"prompt": [-1] * 400_000}),
    ("/v1/completions", {"prompt": [["x"] * 400_000]}),
    ("/v1/chat/completions", {"messages": [{}] * 400_000}),
    ("/v1/responses", {"input": [{}] * 400_000}),
    ("/detokenize", {"tokens": ["x"] * 400_000}),
])
def test_a_body_full_of_faults_is_refused_at_the_first(client: TestClient, path: str, fields: dict[str, Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(error: Any, content: object) -> ApiError:
        counts.append(error.error_count())
        return malformed(error, content)

    monkeypatch.setattr(app, "malformed", counted)
    body = json.dumps({"model": "tiny", **fields})
    found = client.post(path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert all(count < 50 for count in counts)  # of 400,000


def test_more_answers_than_may_wait_are_refused_before_any_work(chat_model: Path, serve: Callable[..., Any],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"tiny": chat_model}) as client:
        monkeypatch.setattr("torchchat_core.server.completions.prompts_of", None)
        found = client.post("/v1/completions", json={"model": "tiny", "prompt": ["x"] * 2048, "n": 128})
        assert found.status_code == 400
