"""The libraries of the executorch wheel, without the Python packages around them, whose import takes seconds."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tc_executorch.machine import serial_products_in_pool
from torchchat_core.errors import TorchchatError
from torchchat_core.first_load import in_first_load

_standard_error = threading.RLock()  # the process has one, which two threads must not exchange at a time
REINSTALL = "pip install --force-reinstall tc-executorch"
OPERATORS = (("extension/llm/custom_ops", "custom_ops_aot_lib"), ("kernels/quantized", "quantized_ops_aot_lib"))


@cache
def bindings() -> Any:
    """ExecuTorch's Python bindings, with the operators that our programs call.

    Raises `TorchchatError` where the wheel is not there, or was built for another PyTorch.
    """
    try:
        library = importlib.import_module("executorch.extension.pybindings._portable_lib")
        for folder, name in OPERATORS:
            torch.ops.load_library(str(_library(folder, name)))
    except (ImportError, OSError, StopIteration) as error:
        raise TorchchatError(f"ExecuTorch's libraries cannot be loaded with PyTorch {torch.__version__}: {error}",
                             REINSTALL) from error
    with messages():  # of a first look at the processor
        threads = torch.get_num_threads()
        if library._threadpool_get_thread_count() != threads:
            library._unsafe_reset_threadpool(threads)  # nothing runs yet
        serial_products_in_pool(str(library.__file__), threads)
    return library


def _library(folder: str, name: str) -> Path:
    spec = importlib.util.find_spec("executorch.extension.pybindings._portable_lib")
    if spec is None or spec.origin is None:
        raise ImportError("the package executorch is not installed")
    root = Path(spec.origin).parents[2]
    return next(path for path in (root / folder).iterdir() if name in path.name)


@contextmanager
def messages() -> Iterator[list[str]]:
    """What ExecuTorch writes to standard error inside the block, by lines, in place of showing it.

    Some of it is written to `sys.stderr`, some directly to the file descriptor. In the child process of a first load,
    all of it is shown, because it may explain a crash.
    """
    lines: list[str] = []
    if in_first_load():
        yield lines
        return
    said = io.StringIO()
    with _standard_error, tempfile.TemporaryFile() as file:
        before = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            with redirect_stderr(said):
                yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += [*file.read().decode(errors="replace").splitlines(), *said.getvalue().splitlines()]
