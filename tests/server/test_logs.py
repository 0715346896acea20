"""The server logs its own messages to standard error, and none of its libraries'."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.server.logs import log_failure, own_messages

HALF = (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 9\r\n\r\n{")


def test_two_signals_stop_a_busy_server_without_a_traceback(chat_model: Path, start: Callable[..., Any]) -> None:
    process, address = start(chat_model)
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as malformed, socket.create_connection((host, int(port))) as half:
        malformed.sendall(b"GARBAGE\r\n\r\n")
        malformed.recv(10)
        half.sendall(HALF)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_the_end_of_the_grace_period_is_one_line(chat_model: Path, start: Callable[..., Any]) -> None:
    process, address = start(chat_model, "--grace", "1")
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(HALF)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    written = process.stderr.read()
    assert written in ("", "error: the grace period is over: 1 requests were cut off\n")


def test_messages_of_other_libraries_are_translated(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = logging.getLogger("uvicorn.error")
    with own_messages():
        theirs.warning("Invalid HTTP request received.")
        theirs.error("Traceback (most recent call last):\n  File x\nasyncio.exceptions.CancelledError")
        theirs.error("Exception in ASGI application\n", exc_info=asyncio.CancelledError())
        theirs.error("ASGI callable returned without completing response.")
        assert capsys.readouterr().err == ""
        theirs.error("Cancel %s running task(s), timeout graceful shutdown exceeded", 2)
        theirs.error("Exception in ASGI application\n", exc_info=ValueError("odd"))
        logging.getLogger("asyncio").error("Task exception was never retrieved")
        log_failure("request req_1 failed", ValueError("two\nlines"))
    assert capsys.readouterr().err == (
        "error: the grace period is over: 2 requests were cut off\n"
        "error: a request failed: ValueError: odd; --debug shows the traceback\n"
        "error: the HTTP server failed; --debug shows why\n"
        "error: request req_1 failed: ValueError: two lines; --debug shows the traceback\n")


def test_with_debug_everything_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torchchat"), "level", logging.DEBUG)
    logging.getLogger("torchchat").manager._clear_cache()  # type: ignore[attr-defined]
    try:
        with own_messages():
            try:
                raise ValueError("odd")
            except ValueError as error:
                log_failure("request req_1 failed", error)
            logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    finally:
        monkeypatch.undo()
        logging.getLogger("torchchat").manager._clear_cache()  # type: ignore[attr-defined]
    written = capsys.readouterr().err
    assert "error: request req_1 failed: ValueError: odd at " in written
    assert 'raise ValueError("odd")' in written
    assert "debug: uvicorn.error: Invalid HTTP request received." in written
