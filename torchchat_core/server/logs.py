"""Log the server's own messages to standard error instead of those of its libraries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator

from torchchat_core.errors import TorchchatError

OURS = logging.getLogger("torchchat.server")
THEIRS = ("uvicorn", "asyncio")
CANCELLED = "Cancel %s running task(s)"  # start of uvicorn's message when the grace period is over


def log_failure(what: str, error: BaseException) -> None:
    """Log a fault in one line: what failed, why and where. With `--debug`, its traceback follows."""
    OURS.error("%s", _line(what, error), exc_info=error if _debugging() else None)


@contextlib.contextmanager
def own_messages() -> Iterator[None]:
    """Replace log messages of libraries in the block with the server's own, on standard error."""
    ours, theirs = logging.StreamHandler(), _Translator()
    ours.setFormatter(logging.Formatter("error: %(message)s"))
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate)
              for name in (OURS.name, *THEIRS)}
    for name in before:
        logging.getLogger(name).handlers[:] = [ours if name == OURS.name else theirs]
        logging.getLogger(name).propagate = False
    try:
        yield
    finally:
        for name, (handlers, propagates) in before.items():
            logging.getLogger(name).handlers[:] = handlers
            logging.getLogger(name).propagate = propagates


class _Translator(logging.Handler):
    """Translate log records of other libraries. With `--debug`, print them unchanged instead."""

    def emit(self, record: logging.LogRecord) -> None:
        if _debugging():
            sys.stderr.write(f"debug: {record.name}: {self.format(record)}\n")
            return
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.ERROR or isinstance(error, asyncio.CancelledError):
            return  # a malformed request gets a response and needs no log line
        words = str(record.msg)
        if words.startswith(CANCELLED):
            OURS.error("the grace period is over: %s requests were cut off", record.args[0]
                       if isinstance(record.args, tuple) and record.args else "some")
        elif error is not None:
            OURS.error("%s", _line("a request failed", error))
        elif not words.startswith(("Traceback", "ASGI callable")):  # cancelled tasks; disconnected clients
            OURS.error("the HTTP server failed; --debug shows why")


def _line(what: str, error: BaseException) -> str:
    if isinstance(error, TorchchatError):
        return f"{what}: {error.message}"
    words = " ".join(str(error).split())[:200]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/site-packages/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{what}: {type(error).__name__}{': ' if words else ''}{words}{place}; --debug shows the traceback"


def _debugging() -> bool:
    return logging.getLogger("torchchat").isEnabledFor(logging.DEBUG)
