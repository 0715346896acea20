"""The verb: how it is found, what it refuses, and what stands before its pages."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tc_streamlit_chat.command import make_services
from tc_streamlit_chat.serving import Guard, owner_of, policy
from torchchat_core.cli.main import main
from torchchat_core.plugins import load_registry
from torchchat_core.specs import CommandInfo


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["browser", *arguments])
    return int(caught.value.code or 0), capsys.readouterr().err


def test_the_verb_is_offered_and_loading_it_imports_nothing_heavy() -> None:
    assert load_registry().find(CommandInfo, "browser").make().name == "browser"
    code = "import sys, torchchat_core.plugins as p; p.load_registry(); " \
           "print({'streamlit', 'torch', 'httpx', 'sqlite3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["no-such-model"], 1, "there is no model 'no-such-model'"),
    (["--temperature", "-1"], 2, "--temperature is -1.0"),
    (["--num-samples", "0"], 2, "--num-samples"),
    (["--url", "http://127.0.0.1:9"], 1, "cannot be reached"),
    (["--url", "http://127.0.0.1:9", "--executor", "eager"], 2, "--executor is for models that run here"),
    (["--url", "http://127.0.0.1:9", "--max-loaded", "3"], 2, "--max-loaded is for models that run here"),
    (["--api-key", "K"], 2, "--api-key is for the server"),
    (["--conversations", "/dev/null/x"], 1, "conversations cannot be kept"),
])
def test_what_is_wrong_is_told_before_anything_is_served(capsys: pytest.CaptureFixture[str], arguments: list[str],
                                                        status: int, message: str, tmp_path: Any,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    code, told = ended(capsys, *arguments)
    assert (code, message in told) == (status, True), told


def test_what_is_not_installed_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "streamlit" else found(name))
    assert ended(capsys) == (1, "error: the browser chat needs streamlit\ntry: pip install tc-streamlit-chat\n")


def test_ctrl_c_ends_it_though_a_page_is_open(tmp_path: Any) -> None:
    process = subprocess.Popen([sys.executable, "-m", "torchchat_core", "browser", "--port", "0", "--conversations",
                                str(tmp_path / "c")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().partition("://")[2].strip()
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # a page that is open
        connection.sendall(f"GET /_stcore/stream HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: "
                           "websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
                           "dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
        assert connection.recv(12).split()[1] == b"101"
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (0, "", "")


def test_an_address_that_cannot_be_used_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str],
                                                                           tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, told = ended(capsys, "no-such-model", "--port", port, "--conversations", str(tmp_path / "c"))
    assert (status, told) == (1, f"error: cannot listen at 127.0.0.1:{port}: Address already in use\n"
                                 "try: choose another --port, or end what is using it\n")
    status, told = ended(capsys, "no-such-model", "--host", "nowhere.invalid", "--port", "0")
    assert status == 1
    assert "cannot listen at nowhere.invalid:0" in told
    assert "try: name an address of this machine with --host" in told
    assert not (tmp_path / "c").exists()


def test_a_model_that_a_server_does_not_list_is_told(capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    found = httpx.Response(200, json={"data": [{"id": "one"}, {"id": "two"}]})
    monkeypatch.setattr(httpx, "get", lambda *_, **__: found)
    flags = {"url": "http://127.0.0.1:9", "api_key": None, "model": "three", "conversations": str(tmp_path / "c"),
             "system": None, "max_new_tokens": None, "stop": (), "num_samples": 1, "logit_bias": ()}
    make_services(flags, load_registry(), True).close()
    assert capsys.readouterr().err == "warning: http://127.0.0.1:9/v1 lists no model 'three'; it has one, two\n"


def test_pages_of_other_hosts_and_names_are_kept_out(served: str) -> None:
    host = served.partition("://")[2]
    answer = httpx.get(served)
    assert answer.status_code == 200
    assert f"connect-src 'self' ws://{host} wss://{host};" in answer.headers["content-security-policy"]
    assert "img-src 'self' data: blob:;" in answer.headers["content-security-policy"]
    assert "torchchat_browser" not in answer.headers.get("set-cookie", "")
    for headers in ({"host": "attacker.example"}, {"origin": "http://attacker.example"}, {"origin": "null"},
                    {"host": f"attacker.example:{host.rpartition(':')[2]}"}):
        assert httpx.get(served, headers=headers).status_code == 403
    for path in ("/_stcore/health", "/static/../../etc/passwd", "/app/static/x", "/_stcore/agent/openapi.json"):
        assert "root:" not in httpx.get(served + path).text


@pytest.mark.parametrize(("origin", "status"), [(None, 101), ("same", 101), ("http://attacker.example", 403),
                                                ("http://127.0.0.1:1", 403)])
def test_websockets_are_for_our_own_pages(served: str, origin: str | None, status: int) -> None:
    host = served.partition("://")[2]
    headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
               "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    if origin is not None:
        headers["origin"] = served if origin == "same" else origin
    with socket.create_connection((host.partition(":")[0], int(host.partition(":")[2])), timeout=30) as connection:
        lines = ["GET /_stcore/stream HTTP/1.1", f"Host: {host}", *(f"{name}: {headers[name]}" for name in headers)]
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        assert connection.recv(12).split()[1] == str(status).encode()


def test_browsers_that_are_not_this_machines_are_told_apart() -> None:
    sent: list[Any] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})

    async def collect(message: Any) -> None:
        sent.append(message)

    def cookies(private: bool, cookie: str) -> list[str]:
        import asyncio

        sent.clear()
        scope = {"type": "http", "headers": [(b"host", b"box:5000"), (b"cookie", cookie.encode())]}
        asyncio.run(Guard(page, (), private)(scope, None, collect))  # type: ignore[arg-type]
        return [value.decode() for name, value in sent[0]["headers"] if name == b"set-cookie"]

    first = cookies(False, "")[0]
    assert "HttpOnly; SameSite=Strict" in first
    name = owner_of(first.partition(";")[0])
    assert name is not None
    assert owner_of(cookies(False, "")[0].partition(";")[0]) != name
    assert cookies(False, first.partition(";")[0]) == []  # it has been told
    assert cookies(True, "") == []
    assert owner_of("torchchat_browser=short") is None
    assert owner_of("torchchat_browser=" + "'; DROP TABLE message; --".ljust(40)) is None


def test_a_strange_host_does_not_write_the_policy() -> None:
    assert "evil" not in policy("x; script-src evil")
    assert "ws://[::1]:5000" in policy("[::1]:5000")


def test_the_command_line_of_the_originals_readme(run_browser: Callable[..., str], testdata: Any) -> None:
    address = run_browser(str(testdata / "tinyllamas" / "stories260K" / "stories260K.pt"), "--temperature", "0",
                          "--num-samples", "10")
    assert httpx.get(f"{address}/_stcore/health").text == "ok"
