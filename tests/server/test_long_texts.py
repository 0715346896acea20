"""Long texts are rejected without being encoded if they cannot fit, and do not block other requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from torchchat_core.server import app, texts
from torchchat_core.tokenizers.hugging_face import HuggingFaceTokenizer
from torchchat_core.tokenizers.library import Library
from torchchat_core.tokenizers.slicing import slices

LIMIT = 1023  # tokens of a prompt of the tiny model
LONGEST = 8  # bytes of its longest token, <|turn|>
FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input",
          "/v1/embeddings": "input", "/tokenize": "prompt"}


def body(path: str, text: str) -> dict[str, Any]:
    value: Any = [{"role": "user", "content": text}] if FIELDS[path] == "messages" else text
    return {"model": "tiny", FIELDS[path]: value}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Record the length and the thread of each text that the tokenizers library encodes."""
    found: list[tuple[int, str]] = []
    for name in ("encode", "encode_with_starts"):
        real = getattr(Library, name)

        def noted(self: Library, text: str, *, special: bool, real: Any = real) -> Any:
            found.append((len(text), threading.current_thread().name))
            return real(self, text, special=special)

        monkeypatch.setattr(Library, name, noted)
    return found


@pytest.mark.parametrize("path", FIELDS)
def test_a_text_that_cannot_fit_is_refused_without_being_encoded(
        client: TestClient, path: str, encoded: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_TOKENS", LIMIT)
    found = client.post(path, json=body(path, "a" * (LIMIT * LONGEST + 1)))
    assert found.status_code == 400
    error = found.json()["error"]
    assert (error["param"], error["code"]) == (FIELDS[path], "context_length_exceeded")
    assert f"more than {LIMIT} tokens" in error["message"]
    assert encoded == []


@pytest.mark.parametrize("path", FIELDS)
def test_a_long_text_is_encoded_in_slices_up_to_the_limit(
        client: TestClient, path: str, encoded: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_TOKENS", LIMIT)
    monkeypatch.setattr(HuggingFaceTokenizer, "longest_token", None, raising=False)
    for engine in (entry.engine for entry in client.app.state.service.shelf.loaded):  # type: ignore[attr-defined]
        monkeypatch.setattr(engine.opened.text_format.tokenizer, "longest_token", None)
    found = client.post(path, json=body(path, "some words " * 30_000))
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert sum(size for size, _ in encoded) < 60_000  # of 330,000 characters
    assert {thread.rpartition("_")[0] for _, thread in encoded} == {"torchchat-prompts"}


@pytest.mark.parametrize("path", FIELDS)
def test_a_large_body_is_never_read_on_the_event_loop(client: TestClient, path: str, monkeypatch: pytest.MonkeyPatch
                                                      ) -> None:
    threads = []
    real = app.parsed

    def noted(kind: Any, content: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return real(kind, content)

    monkeypatch.setattr(app, "parsed", noted)
    assert client.post(path, json=body(path, " " * 100_000)).status_code in (200, 400)
    assert [name.rpartition("_")[0] for name in threads] == ["torchchat-bodies"]


def test_long_texts_count_as_waiting_and_do_not_block_health_checks(
        chat_model: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = Library.encode_with_starts

    def held(self: Library, text: str, *, special: bool) -> Any:
        begun.set()
        assert go_on.wait(60)
        return real(self, text, special=special)

    with serve({"tiny": chat_model}, max_queue=1, parallel=1) as client, ThreadPoolExecutor() as pool:
        tokenizer = client.app.state.service.shelf.loaded[0].engine.opened.text_format.tokenizer
        monkeypatch.setattr(tokenizer, "longest_token", None)
        monkeypatch.setattr(Library, "encode_with_starts", held)
        long = [pool.submit(client.post, "/v1/completions", json=body("/v1/completions", "a" * 100_000))
                for _ in range(2)]
        assert begun.wait(60)
        while client.app.state.service.shelf.loaded[0].engine.in_progress < 2:
            assert client.get("/health").status_code == 200
        short = client.post("/v1/completions", json=body("/v1/completions", "a"))
        assert (short.status_code, short.json()["error"]["code"]) == (429, "queue_full")
        go_on.set()
        assert {each.result().status_code for each in long} == {400}
        assert client.post("/v1/completions", json=body("/v1/completions", "a")).status_code == 200


@pytest.mark.parametrize("path", FIELDS)
def test_a_text_that_cannot_be_cut_is_a_400_that_names_the_field(
        client: TestClient, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncut(*_: Any, **__: Any) -> Any:
        return slices("a" * 5000, lambda text: ([len(text)], [0]), size=300, edge=32, longest=1000)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode_slices", uncut)
    found = client.post(path, json=body(path, "some words"))
    assert found.status_code == 400
    assert found.json()["error"]["param"] == FIELDS[path]
    assert "cannot be cut" in found.json()["error"]["message"]


def test_a_text_that_crashes_the_tokenizer_is_a_500(
        client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException):
        """Panics of the library are no subclass of `Exception`."""

    def fails(*_: Any, **__: Any) -> Any:
        raise Panic("retry-limit-in-match over")

    engine = client.app.state.service.shelf.loaded[0].engine  # type: ignore[attr-defined]
    library = engine.opened.text_format.tokenizer._library
    broken = type("Broken", (), {"encode": fails})()
    monkeypatch.setattr(library, "_tokenizer", broken)
    for path in FIELDS:
        found = client.post(path, json=body(path, "a" * 40 + "!"))
        assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error"), path
        assert "tokenizer" in found.json()["error"]["message"]
    assert "tokenizer.json fails: retry-limit" in caplog.text


@pytest.mark.parametrize("content", ["[" + ",".join(["[1]"] * 300_000) + "]", "[" + ",".join(["1"] * 1_500_000) + "]",
                                     "[" + ",".join(['"\\",\\\\"'] * 1_200_000) + "]"],
                         ids=["lists", "numbers", "texts"])
def test_a_body_of_too_many_values_is_refused_before_it_is_read(
        chat_model: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    with serve({"tiny": chat_model}, max_body_bytes=1 << 25) as client:
        monkeypatch.setattr("torchchat_core.server.schemas.CompletionRequest.model_validate_json", None)
        found = client.post("/v1/completions", content=f'{{"model": "tiny", "prompt": {content}}}',
                            headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert "values" in found.json()["error"]["message"]


def test_a_text_full_of_commas_and_brackets_is_a_text(client: TestClient) -> None:
    text = '[{"a\\": ' * 20_000 + ",[{" * 500_000
    found = client.post("/v1/completions", content=json.dumps(body("/v1/completions", text)),
                        headers={"content-type": "application/json"})
    assert found.json()["error"]["code"] == "context_length_exceeded"
