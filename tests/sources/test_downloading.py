"""Where redirects may lead, how long a busy server is waited for, and what of its answers is taken."""

from __future__ import annotations

import gzip
import io
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import Request

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.sources import downloading
from torchchat_core.sources.downloading import (
    ConnectionFailure,
    Download,
    HTTPFailure,
    download,
    seconds_to_wait,
    trying_again,
    whole_number,
)


def redirected(url: str, target: str) -> Request | None:
    request = Request(url, headers={"Authorization": "Bearer secret", "Range": "bytes=5-"})
    return downloading._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", Message(), target)


def test_a_redirect_to_another_host_loses_the_token_and_keeps_the_range() -> None:
    there = redirected("https://hub.example/a", "https://cdn.example/b")
    assert there is not None
    assert dict(there.header_items()) == {"Range": "bytes=5-"}
    same = redirected("https://hub.example/a", "https://hub.example/b")
    assert same is not None
    assert same.get_header("Authorization") == "Bearer secret"


@pytest.mark.parametrize("target", ["http://cdn.example/b", "http://127.0.0.1/b", "https://localhost/b",
                                    "https://[::1]/b", "ftp://cdn.example/b"])
def test_a_server_elsewhere_redirects_to_https_elsewhere_alone(target: str) -> None:
    with pytest.raises(TorchchatError):
        redirected("https://hub.example/a", target)


def test_a_users_own_hub_may_be_without_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TorchchatError):
        downloading.check_encrypted("http://mirror.lan:8080/a/b")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.lan:8080")
    downloading.check_encrypted("http://mirror.lan:8080/a/b")
    with pytest.raises(TorchchatError):
        downloading.check_encrypted("http://mirror.lan:80801/a/b")


@pytest.mark.parametrize(("headers", "seconds"), [
    ({}, None), ({"retry-after": "7"}, 7.0), ({"retry-after": "soon"}, None),
    ({"ratelimit": '"api";r=0;t=55'}, 55.0), ({"ratelimit": '"api";r=10;t=55', "retry-after": "3"}, 3.0)])
def test_a_server_says_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert seconds_to_wait(headers) == seconds


def test_a_server_may_name_a_time_to_wait_for() -> None:
    waited = seconds_to_wait({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert waited is not None
    assert 90 < waited < 110


@pytest.mark.parametrize(("failure", "attempts"), [
    (ConnectionFailure("gone"), downloading.FIRST_ATTEMPTS), (HTTPFailure(503, {}, ""), downloading.ATTEMPTS),
    (HTTPFailure(404, {}, ""), 1), (HTTPFailure(429, {"Retry-After": "61"}, ""), 1)])
def test_only_what_may_pass_is_tried_again(failure: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise failure

    with pytest.raises(type(failure)):
        trying_again(fail)
    assert len(calls) == attempts


@pytest.mark.parametrize("headers", [{"retry-after": "²"}, {"retry-after": "9" * 5000}, {"ratelimit": "r=0;t=²"},
                                     {"retry-after": "Fri, 31 Dec 999999999999 23:59:59 GMT"}])
def test_a_time_to_wait_that_is_no_number_counts_as_none(headers: dict[str, str]) -> None:
    assert seconds_to_wait(headers) is None


# ---- servers that do not do as they are asked ---------------------------------------------------------------------


CONTENT = bytes(range(256)) * 40


class Scripted(BaseHTTPRequestHandler):
    """Answers each request by the next of `answers`, the last one for ever: status, headers, body."""

    answers: ClassVar[list[tuple[int, dict[str, str], bytes]]] = []
    requests: ClassVar[list[str | None]] = []

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        self.requests.append(self.headers.get("Range"))
        status, headers, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[str | None]]]:
    """Fetches a file of `size` bytes, of which `begun` are here, from a server with such answers; the ranges that it
    was asked for. What came is in tmp_path/"file"."""
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = type("Handler", (Scripted,), {"answers": [], "requests": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def fetch(*answers: tuple[int, dict[str, str], bytes], size: int | None = len(CONTENT), begun: int = 0
              ) -> list[str | None]:
        handler.answers[:] = answers
        (tmp_path / "file").write_bytes(CONTENT[:begun])
        stop = threading.Event()
        guard = threading.Timer(10, stop.set)  # a download without end ends as `Cancelled`
        guard.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/blob"
            download(Download(url, tmp_path / "file", "model.gguf", size), lambda _: None, stop)
        finally:
            guard.cancel()
        return handler.requests

    fetch.requests = handler.requests  # type: ignore[attr-defined]
    yield fetch
    server.shutdown()
    server.server_close()


def length(count: int) -> dict[str, str]:
    return {"Content-Length": str(count)}


def test_a_file_that_is_shorter_than_announced_is_told_at_once(server: Any) -> None:
    with pytest.raises(TorchchatError, match=rf"has {len(CONTENT)} bytes of model.gguf, and {len(CONTENT) + 100} were"):
        server((200, length(len(CONTENT)), CONTENT), size=len(CONTENT) + 100)
    assert server.requests == [None]


def test_a_short_file_of_a_server_that_names_no_size_is_begun_anew_once(server: Any) -> None:
    whole, over = (200, {}, CONTENT), (416, {"Content-Range": f"bytes */{len(CONTENT)}"}, b"")
    with pytest.raises(TorchchatError, match=rf"has {len(CONTENT)} bytes of model.gguf"):
        server(whole, over, whole, over, whole, over, size=len(CONTENT) + 100)
    assert server.requests == [None, f"bytes={len(CONTENT)}-"] * 2


def test_bytes_that_come_again_are_no_progress(server: Any) -> None:
    cut = (200, length(len(CONTENT)), CONTENT[:1000])  # whatever range is asked for
    with pytest.raises(ConnectionFailure):
        server(cut)
    assert len(server.requests) == downloading.ATTEMPTS


@pytest.mark.parametrize(("begun", "requests"), [(0, 1), (1000, 2)])
def test_a_server_that_has_no_range_at_all_is_left(server: Any, begun: int, requests: int) -> None:
    with pytest.raises(HTTPFailure):
        server((416, {}, b""), begun=begun)
    assert len(server.requests) == requests


def test_a_part_is_not_taken_for_the_whole(server: Any, tmp_path: Path) -> None:
    part = (206, {**length(100), "Content-Range": f"bytes 0-99/{len(CONTENT)}"}, CONTENT[:100])
    with pytest.raises(ConnectionFailure, match="another part of the file"):
        server(part, size=None)
    assert (tmp_path / "file").read_bytes() == b""


def test_another_part_than_the_rest_is_not_appended(server: Any, tmp_path: Path) -> None:
    other = (206, {**length(50), "Content-Range": f"bytes 5-54/{len(CONTENT)}"}, CONTENT[5:55])
    rest = (206, {**length(len(CONTENT) - 1000), "Content-Range": f"bytes 1000-{len(CONTENT) - 1}/{len(CONTENT)}"},
            CONTENT[1000:])
    server(other, rest, begun=1000)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_packed_file_is_refused(server: Any, tmp_path: Path) -> None:
    with pytest.raises(TorchchatError, match=r"sends model.gguf packed \(Content-Encoding 'gzip'\)"):
        server((200, {"Content-Encoding": "gzip"}, gzip.compress(CONTENT)), size=None)
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "1e3"])
def test_a_size_that_is_no_number_counts_as_none(server: Any, tmp_path: Path, number: str) -> None:
    server((200, {"Content-Length": number}, CONTENT), size=None)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert whole_number(number) is None


def test_a_file_without_end_leaves_room_on_the_disk(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloading, "LOOK_AT_DISK", 1000)
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage(10, 0, downloading.RESERVE - 1))
    with pytest.raises(TorchchatError, match="the server does not say how many there are"):
        server((200, {}, CONTENT), size=None)


def test_more_bytes_than_announced_are_told_with_the_name_of_the_file(server: Any) -> None:
    with pytest.raises(TorchchatError, match=r"more than the 100 bytes that model\.gguf has"):
        server((200, {}, CONTENT), size=100)
