"""Run a task in a child process, so that a crash or running out of memory affects only that task.

A task is a function of `(registry, **arguments)` with plain arguments that returns a plain object (what JSON can say).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.settings import load_settings

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

Found = dict[str, Any]


class ProcessEnded(TorchchatError):
    """The child process crashed or was killed before its task was done."""


def in_own_process(task: str, arguments: Mapping[str, Any], registry: Registry, *, timeout: float | None = None,
                   environment: Mapping[str, str] | None = None) -> Found:
    """What the task "package.module:function" returns in a new process with the same plugins.

    `timeout` is in seconds; `environment` is added to the current one. Raises the `TorchchatError` that the task
    raises, or `ProcessEnded`, which says how the process ended, if it ended without a result.
    """
    disabled = [plugin.qualified_name for plugin in registry.plugins if plugin.state == "disabled"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        order = {"task": task, "arguments": dict(arguments), "disabled": disabled, "result": str(result)}
        try:
            done = subprocess.run([sys.executable, "-P", "-m", __name__], input=json.dumps(order).encode(), check=False,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=timeout,
                                  env={**_environment(), **(environment or {})})
        except subprocess.TimeoutExpired:
            raise ProcessEnded(f"the process timed out after {timeout:g} s") from None
        if not result.exists():
            raise ProcessEnded(_end(done))
        told: Found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in told:
        raise TorchchatError(told["error"], told["fix"])
    found: Found = told["found"]
    return found


def request_arguments(request: ModelRequest) -> dict[str, Any]:
    """The request as plain values, without a calibration text."""
    return {**dataclasses.asdict(dataclasses.replace(request, calibration=None)), "defaults": sorted(request.defaults)}


def request_of(arguments: Mapping[str, Any]) -> ModelRequest:
    """What `request_arguments` made plain."""
    from torchchat_core.pipeline import ModelRequest

    return ModelRequest(**{**arguments, "defaults": frozenset(arguments["defaults"])})


def _environment() -> dict[str, str]:
    """Ours, with the folders that modules are imported from: plugins need not be installed where Python looks."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _end(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    said = f": {lines[-1]:.200}" if lines else ""
    if done.returncode >= 0:
        return f"the process ended with status {done.returncode}{said}"
    try:
        name = signal.Signals(-done.returncode).name
    except ValueError:
        name = f"signal {-done.returncode}"
    why = ", as the system does where memory is out" if name == "SIGKILL" else said
    return f"the process was ended by {name}{why}"


# ---- within the new process ---------------------------------------------------------------------------------------


def main() -> None:
    """Does what standard input asks for, and writes what came of it to a file."""
    order = json.load(sys.stdin)
    try:
        registry = load_registry(disabled=order["disabled"], prefer=load_settings().prefer)
        told: Found = {"found": _task(order["task"])(registry, **order["arguments"])}
    except TorchchatError as error:
        told = {"error": error.message, "fix": error.fix}
    except (MemoryError, RuntimeError) as error:  # torch's own way to say that memory is out
        told = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", "fix": None}
    Path(order["result"]).write_text(json.dumps(told), encoding="utf-8")


def _task(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    task: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return task


if __name__ == "__main__":
    main()
