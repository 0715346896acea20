"""Several threads with one standard error, and with one program."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tc_executorch.executor import ExecutorchSession
from tc_executorch.runtime import messages

PATIENCE = 30.0  # seconds, on a busy machine


def test_two_threads_do_not_exchange_standard_error_at_a_time() -> None:
    before, inside = os.fstat(2), threading.Event()
    heard: list[list[str]] = []

    def listen() -> None:
        with messages() as lines:
            inside.set()
            os.write(2, b"second\n")
        heard.append(lines)

    with messages() as lines:
        thread = threading.Thread(target=listen)
        thread.start()
        assert not inside.wait(0.2)
        os.write(2, b"first\n")
    thread.join(PATIENCE)
    assert (lines, heard) == (["first"], [["second"]])
    after = os.fstat(2)
    assert (after.st_dev, after.st_ino) == (before.st_dev, before.st_ino)


@pytest.mark.parametrize("act", [lambda session: session.truncate(0), lambda session: session.close()])
def test_a_session_changes_when_nothing_runs(act: Callable[[ExecutorchSession], None]) -> None:
    model: Any = SimpleNamespace(lock=threading.RLock())
    session, done = ExecutorchSession(model, 5), threading.Event()

    def change() -> None:
        act(session)
        done.set()

    with model.lock:
        thread = threading.Thread(target=change)
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(PATIENCE)
    thread.join(PATIENCE)


def test_a_session_that_ends_does_not_take_what_another_one_has() -> None:
    model: Any = SimpleNamespace(lock=threading.RLock())
    first, second = ExecutorchSession(model, 5), ExecutorchSession(model, 5)
    method: Any = SimpleNamespace(owner=second)
    first._method = second._method = method
    first.close()
    assert method.owner is second
    second.close()
    assert method.owner is None
