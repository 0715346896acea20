"""The program `torchchat-probe`, which runs parts of the C++ library for the tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class ProbeError(Exception):
    """The library threw an `Error`."""


class Probe:
    """One process; a question is a line of JSON, and so is its answer."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, do: str, **question: Any) -> Any:
        """The answer. Raises `ProbeError` where the library refuses, `EOFError` where the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **question}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the probe ended with status {self._process.wait()} at {do!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise ProbeError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        """Ends the process. Raises `AssertionError` where that was not in order, as sanitizers make it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0
