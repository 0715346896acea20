"""Ctrl-C ends an answer first, and the program only when it is pressed again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C only makes the yielded function true; a second one raises KeyboardInterrupt."""
    pressed = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def without_echo() -> Iterator[None]:
    """Turn off the terminal's echo in the block. Text typed ahead is still read afterwards.

    Does nothing without a terminal, or on systems without termios.
    """
    before = _terminal_modes()
    if before is None:
        yield
        return
    import termios

    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _terminal_modes() -> list[Any] | None:
    """Return the terminal modes of standard input; None if it is not a terminal, or on Windows."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        return None
    import termios

    return termios.tcgetattr(sys.stdin)
