"""Malformed, ambiguous, oversized and incomplete request heads over a real connection, and request ids."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import load_registry
from torchchat_core.server import protocol
from torchchat_core.server.app import ServerOptions, make_app
from torchchat_core.server.limits import Limits
from torchchat_core.server.running import listen, make_server

BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine-1\r\n"
JSON_TYPE = b"content-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[tuple[str, int]]:
    """Start a server on a thread of this process, and return its host and port."""
    options = ServerOptions(models={"tiny": ModelRequest(model=str(folder))}, limits=Limits(), local=True)
    ready, listener = threading.Event(), listen("127.0.0.1", 0)
    server = make_server(make_app(options, load_registry()), 1.0, ready.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert ready.wait(60)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def address(chat_model: Path) -> Iterator[tuple[str, int]]:
    with listening(chat_model) as found:
        yield found


def received(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    connection.settimeout(60)
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def answer(data: bytes) -> tuple[int, dict[str, str], Any]:
    """Parse a response into status, headers and JSON body."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(("head", "status", "words"), [
    (POST + JSON_TYPE + LENGTH + b"transfer-encoding: chunked\r\n", 400, "transfer-encoding"),
    (POST + JSON_TYPE + LENGTH + b"Authorization: Bearer a\r\nauthorization: Bearer b\r\n", 400, "authorization"),
    (POST + JSON_TYPE + b"Content-Type: text/plain\r\n" + LENGTH, 400, "content-type"),
    (POST + JSON_TYPE + LENGTH + b"origin: http://localhost\r\norigin: http://localhost\r\n", 400, "origin"),
    (POST + b"".join(b"x-%d: a\r\n" % number for number in range(200)), 431, "headers"),
], ids=["length and encoding", "two keys", "two types", "two origins", "too many"])
def test_an_ambiguous_head_is_refused_and_the_connection_closed(address: tuple[str, int], head: bytes, status: int,
                                                                words: str) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(head + b"\r\n" + BODY)
        found, headers, body = answer(received(connection))
    assert (found, headers["connection"], headers["x-request-id"]) == (status, "close", "mine-1")
    assert words in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [
    b"GARBAGE\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"GET /health HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
], ids=["words", "no host", "TLS", "two hosts", "no colon", "two lengths", "encoding"])
def test_invalid_http_gets_a_json_error_with_an_id(address: tuple[str, int], data: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(data)
        status, headers, body = answer(received(connection))
    assert status in (400, 501)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["x-request-id"].startswith("req_")
    assert body["error"]["message"].startswith("the request is not valid HTTP/1.1")


@pytest.mark.parametrize(("data", "words"), [
    (b"GET /health HTTP/1.1\r\nhost: a\r\nbad\x01 header\r\n\r\n", "a header line is malformed"),
    (b"GET /health HTTP/1.1\r\n folded: a\r\n\r\n", "white space"),
    (b"GARBAGE\r\n\r\n", "the request line is malformed"),
    (b"\r\n\r\nGET /health HTTP/1.1\r\nhost: a\r\n\r\n", "the request line"),
    (b"GET /health HTTP/1.1\r\n\r\n", "the header host is missing"),
    (b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "the header host appears more than once"),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", "content-length"),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", "expected a number of bytes"),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", "expected chunked"),
    (POST + JSON_TYPE + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "hexadecimal"),
    (POST + JSON_TYPE + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n", "a chunk does not end"),
    (POST + b"a: " + b"x" * 20_000, "more than 16384 bytes"),
], ids=lambda value: str(value)[-40:])
def test_messages_about_invalid_http_are_sentences_without_python_values(address: tuple[str, int], data: bytes,
                                                                         words: str) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(data)
        _, _, body = answer(received(connection))
    message = body["error"]["message"].removeprefix("the request is not valid HTTP/1.1: ")
    assert words in message
    assert message in (*protocol.FAULTS.values(), protocol.OTHER_FAULT)


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/v1/realtime", 404)])
def test_upgrades_are_ignored_and_answered_with_an_id(address: tuple[str, int], path: str, status: int) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET %s HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine-1\r\nupgrade: websocket\r\n"
                           b"connection: upgrade, close\r\nsec-websocket-version: 13\r\n"
                           b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n" % path.encode())
        found, headers, _ = answer(received(connection))
    assert (found, headers["x-request-id"]) == (status, "mine-1")


@pytest.mark.parametrize(("target", "host", "status"), [
    ("http://localhost/health", "localhost", 200), ("HTTP://127.0.0.1:8000/health?a=b", "localhost", 200),
    ("https://localhost/health#x", "elsewhere.example", 200), ("http://localhost", "localhost", 404),
    ("http://localhost?/health", "localhost", 404), ("http://elsewhere.example/health", "localhost", 403),
    ("http:///health", "localhost", 400), ("http://localhost@elsewhere.example/health", "localhost", 400),
])
def test_the_path_and_host_of_an_absolute_target_are_used(address: tuple[str, int], target: str, host: str,
                                                          status: int) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        found, headers, _ = answer(received(connection))
    assert found == status
    assert headers["x-request-id"]


@pytest.mark.parametrize(("version", "status"), [("1.0", 200), ("1.1", 200), ("0.9", 505), ("1.2", 505), ("2.0", 505)])
def test_versions_other_than_1_0_and_1_1_are_refused(address: tuple[str, int], version: str, status: int) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(f"GET /health HTTP/{version}\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        found, headers, body = answer(received(connection))
    assert found == status
    assert headers["x-request-id"]
    if status == 505:
        assert f"its version is {version}; expected 1.1 or 1.0" in body["error"]["message"]


def test_a_refused_head_request_gets_no_body(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"HEAD /health HTTP/2.0\r\nhost: localhost\r\n\r\n")
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 505 ")
    assert body == b""


def test_a_malformed_chunk_ends_the_request(address: tuple[str, int], capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(POST + JSON_TYPE + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\nzz\r\n")
        status, headers, _ = answer(received(connection))
    assert (status, headers["x-request-id"]) == (400, "mine-1")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("sent", [
    b"GET /health HT", b"\r\n", b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET",
], ids=["half a line", "an empty line", "nothing", "half a second request"])
def test_an_incomplete_head_times_out(chat_model: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    with listening(chat_model) as found, socket.create_connection(found) as connection:
        connection.sendall(sent)
        data = received(connection)  # returns only because the server closes the connection
    if sent == b"GET /health HT":
        status, headers, body = answer(data)
        assert (status, headers["connection"]) == (408, "close")
        assert headers["x-request-id"].startswith("req_")
        assert "the request headers did not arrive" in body["error"]["message"]


def test_waiting_for_the_rest_of_an_answered_body_has_a_limit(
        chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REST_SECONDS", 0.2)
    with listening(chat_model) as found, socket.create_connection(found) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\na")
        status, _, _ = answer(received(connection))
    assert status == 404


@pytest.mark.parametrize(("given", "echoed"), [
    ("abc-DEF_1.2:3/4+5=6@7", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False),
    ("\u00e9", False), ('"x"', False),
])
def test_a_valid_request_id_of_the_client_is_echoed(client: TestClient, given: str, echoed: bool) -> None:
    found = client.get("/health", headers={"x-request-id": given.encode("latin-1")})
    assert (found.headers["x-request-id"] == given) is echoed
    assert found.headers["x-request-id"].startswith("req_") is not echoed


def test_two_request_ids_are_ignored(client: TestClient) -> None:
    found = client.get("/health", headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert found.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(("path", "method", "body"), [
    ("/v1/models", "GET", None), ("/nowhere", "GET", None), ("/health", "DELETE", None), ("/metrics", "GET", None),
    ("/openapi.json", "GET", None), ("/v1/completions", "POST", BODY), ("/v1/completions", "POST", b"{"),
    ("/v1/completions", "POST", json.dumps({**json.loads(BODY), "stream": True}).encode()),
    ("/v1/embeddings", "POST", b'{"model": "none", "input": "a"}'),
])
def test_every_answer_and_error_has_an_id_of_its_own(client: TestClient, path: str, method: str, body: bytes | None
                                                     ) -> None:
    sent: dict[str, Any] = {"content": body, "headers": {"content-type": "application/json"}}
    ids = [client.request(method, path, **sent).headers.get_list("x-request-id") for _ in range(2)]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]


def test_refusals_and_answers_to_pages_have_an_id_too(chat_model: Path, serve: Callable[..., Any]) -> None:
    page = "https://page.example"
    with serve({"tiny": chat_model}, api_key="K", origins=[page]) as asked:
        assert asked.get("/v1/models").headers["x-request-id"]  # 401
        preflight = asked.options("/v1/models", headers={"origin": page, "access-control-request-method": "GET"})
        assert preflight.headers["x-request-id"]
        found = asked.get("/health", headers={"origin": page})
        assert "x-request-id" in found.headers["access-control-expose-headers"]
