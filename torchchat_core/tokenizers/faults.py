"""Faults of tokenizer libraries, panics of their Rust code among them, as errors that name the file."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torchchat_core.errors import TorchchatError

MESSAGE_LENGTH = 200  # characters of the library's own words that a message shows
# What Rust writes to standard error when it panics, with or without a backtrace.
PANIC = re.compile(rb"\n?thread '[^\n]*' [^\n]*panicked at .*", re.DOTALL)
_capturing = threading.RLock()


class TokenizerError(TorchchatError):
    """A tokenizer's file is at fault, not the text that was to be encoded."""


@contextmanager
def named_faults(problem: str, fix: str | None = None) -> Iterator[None]:
    """Raise a `TokenizerError` for every fault in the block, whatever its class: `problem`, and the library's words.

    `problem` names the file.
    """
    try:
        yield
    except (TorchchatError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics are no `Exception`
        words = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"{problem}: {words[:MESSAGE_LENGTH]}",
                             fix or "the file may be damaged: download or copy the model again") from error


@contextmanager
def captured_panics() -> Iterator[None]:
    """Keep what a Rust panic in the block writes to standard error from the user, who gets an error instead.

    Rust writes to the file descriptor itself, so that is redirected for the time of the block. What else was written
    there meanwhile follows when the block ends.
    """
    with _capturing, contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(2)
        except OSError:  # no descriptor 2, or no room for a file: rather a stray line than no tokenizer
            yield
            return
        stack.callback(os.close, saved)
        _flush()
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(saved, 2)
            file.seek(0)
            if rest := PANIC.sub(b"", file.read()):
                os.write(2, rest)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
