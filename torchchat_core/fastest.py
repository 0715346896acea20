"""What `torchchat bench --save` found to run a model fastest on this machine, which `--executor auto` then takes.

Executors do not change what a model says beyond rounding, so that this is a matter of speed alone. A record counts for
one model, machine, device, dtype and recipe; a damaged one counts as none.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.small_files import cache_folder, make_folder, read_json, write_whole

RECORD = "fastest.json"


def remembered_executor(reference: str, device: str, dtype: str, recipe: str | None) -> str | None:
    """The qualified name of the fastest executor for such a model; None where none was saved.

    `recipe`: as of `pipeline.OpenedModel`.
    """
    found = _records().get(_key(reference, device, dtype, recipe))
    return found if isinstance(found, str) else None


def remember_executor(reference: str, device: str, dtype: str, recipe: str | None, executor: str) -> Path:
    """Saves the fastest executor in place of a former one; the record's path.

    Raises `TorchchatError` where it cannot be written.
    """
    records = {**_records(), _key(reference, device, dtype, recipe): executor}
    try:
        make_folder(cache_folder())
    except OSError as error:
        raise TorchchatError(f"cannot make {quoted_path(str(cache_folder()))}: {error.strerror or error}") from None
    path = cache_folder() / RECORD
    write_whole(path, json.dumps({"executors": records}, indent=1) + "\n")
    return path


def _records() -> dict[str, Any]:
    try:
        found = read_json(cache_folder() / RECORD).get("executors")
    except TorchchatError:
        return {}
    return found if isinstance(found, dict) else {}


def _key(reference: str, device: str, dtype: str, recipe: str | None) -> str:
    return " | ".join([reference, _machine(), device, dtype, recipe or "unquantised"])


def _machine() -> str:
    """A home folder may be shared by several machines: processor and number of cores tell them apart."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
