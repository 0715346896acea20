"""Turn faults of tokenizer libraries, including panics in Rust code, into errors that name the file."""

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

MESSAGE_LENGTH = 200  # characters of the library's message in an error
# The output of a Rust panic on standard error, with or without a backtrace.
PANIC = re.compile(rb"\n?thread '[^\n]*' [^\n]*panicked at .*", re.DOTALL)
_capturing = threading.RLock()


class TokenizerError(TorchchatError):
    """An error caused by the tokenizer's file, not by the text to encode."""


@contextmanager
def named_faults(problem: str, fix: str | None = None) -> Iterator[None]:
    """Raise a `TokenizerError` for any exception in the block; its message is `problem` and the library's message.

    `problem` names the file.
    """
    try:
        yield
    except (TorchchatError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # panics in the library are not an `Exception`
        words = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"{problem}: {words[:MESSAGE_LENGTH]}",
                             fix or "the file may be damaged: download or copy the model again") from error


@contextmanager
def captured_panics() -> Iterator[None]:
    """Hide the output of Rust panics in the block from standard error; the user gets an error instead.

    Rust writes to the file descriptor itself, which is redirected in the block. Other output to it is written when the
    block ends.
    """
    with _capturing, contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(2)
        except OSError:  # no descriptor 2, or the disk is full: a stray line is better than no tokenizer
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
