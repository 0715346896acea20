"""Which exported files were compared with their digests before: a start does not read gigabytes of weights again.

What a file is made of is compared at every start, as far as it is small. The rest, weights and programs that hold
them, is compared when a file is first run, and when it is no longer the one that was compared: its place, its inode,
its size, and when it was written and changed are kept in the cache folder with the digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from torchchat_core.artifacts import WEIGHTS, Artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.private_cache import foreign_fault
from torchchat_core.small_files import cache_folder, make_folder, write_whole

FOLDER = "checked"  # in the cache folder
LARGE = 16 << 20  # bytes that are not read at every start
SETTLED_NS = 2_000_000_000  # a file that was written less long ago may be written again in the same tick of its clock


def check_once(artifact: Artifact) -> None:
    """Compares the file with its digests: all of it, unless that was done with this very file before.

    Raises `TorchchatError` where an entry is another one.
    """
    if _remembered(artifact):
        artifact.check(name for name in artifact.manifest.digests
                       if not name.startswith(WEIGHTS) and artifact.place(name)[1] < LARGE)
    else:
        check_all(artifact)


def check_all(artifact: Artifact) -> None:
    """Compares all of the file, and remembers that it did. Raises `TorchchatError` where an entry is another one."""
    before = _identity(artifact)
    record = _record(artifact)
    try:
        artifact.check()
    except TorchchatError:
        with contextlib.suppress(OSError):
            record.unlink(missing_ok=True)
        raise
    written = max(before["written"], before["changed"])
    if before == _identity(artifact) and time.time_ns() - written > SETTLED_NS:
        with contextlib.suppress(OSError, TorchchatError):  # then it is compared again the next time
            make_folder(record.parent)
            write_whole(record, json.dumps(before))
            record.chmod(0o600)


def _remembered(artifact: Artifact) -> bool:
    try:
        record = _record(artifact)
        return foreign_fault(record) is None and bool(json.loads(record.read_bytes()) == _identity(artifact))
    except (OSError, ValueError, RecursionError):
        return False


def _record(artifact: Artifact) -> Path:
    """A file for each place."""
    return cache_folder() / FOLDER / f"{hashlib.sha256(str(artifact.path.resolve()).encode()).hexdigest()[:32]}.json"


def _identity(artifact: Artifact) -> dict[str, Any]:
    """What another file, or the same one after it was written to, differs in."""
    try:
        found = artifact.path.stat()
    except OSError as error:
        raise TorchchatError(f"{artifact.path} cannot be read: {error.strerror or error}") from error
    digests = json.dumps(dict(artifact.manifest.digests), sort_keys=True)
    return {"path": str(artifact.path.resolve()), "device": found.st_dev, "inode": found.st_ino, "size": found.st_size,
            "written": found.st_mtime_ns, "changed": found.st_ctime_ns,
            "digests": hashlib.sha256(digests.encode()).hexdigest()}
