"""Keep work in progress in a hidden folder next to its destination. The next run deletes it if this run is killed.

A running process holds a lock on a file in its folder, which the system releases when the process ends. Process ids
would not work: they are reused, and other machines may write to the same disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on systems without it, leftovers of killed runs are not deleted
    fcntl = None  # type: ignore[assignment]

LOCK, ENDING = "lock", ".partial"
ATTEMPTS = 100
ABANDONED_SECONDS = 3600.0  # age at which a folder without a lock counts as abandoned; locks are created immediately


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path` for an output that replaces `path` once complete; delete the folder at the end.

    Leftovers of killed runs for the same path are deleted first. Raises `OSError` if no folder can be created.
    """
    remove_leftovers(path)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(path: Path) -> None:
    """Delete the folders of killed runs that were writing `path`. Does not raise."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for folder in path.absolute().parent.iterdir():
            if folder.name.startswith(_prefix(path)) and folder.name.endswith(ENDING):
                _remove_if_abandoned(folder)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """Create a folder and lock it. Retry, because another run may delete the folder before it is locked."""
    for _ in range(ATTEMPTS):
        folder = path.absolute().with_name(f"{_prefix(path)}{secrets.token_hex(4)}{ENDING}")
        folder.mkdir()
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # on a disk without locks, no folder is ever deleted as abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / LOCK).exists():
                return folder, lock
            os.close(lock)
    raise OSError(f"no folder can be created next to {path}")


def _remove_if_abandoned(folder: Path) -> None:
    """Delete the folder if the run that created it has ended."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # the lock is held, or the disk has none
        return
    finally:
        os.close(lock)


def _prefix(path: Path) -> str:
    """Return the prefix of folder names for `path`. A digest distinguishes long names."""
    return f".{path.name[:40]}.{hashlib.sha256(path.name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}."
