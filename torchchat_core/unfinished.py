"""Work in progress next to its destination, in a hidden folder that the next run deletes if this one is killed.

Whether a run is still there is told by a lock on a file in its folder, which the system releases when the process ends:
process ids are used again, and say nothing about other machines that write to the same disk.
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
except ImportError:  # systems without it keep what killed runs leave
    fcntl = None  # type: ignore[assignment]

LOCK, ENDING = "lock", ".partial"
ATTEMPTS = 100
ABANDONED_SECONDS = 3600.0  # a folder that has no lock by then was left: the lock comes right after the folder


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`, for what takes the place of `path` when it is whole; it is deleted at the end.

    What killed runs left for the same path is deleted first. Raises `OSError` where no folder can be made.
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
    """Delete the folders of runs that wanted to write `path` and are gone. Nothing is raised."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for folder in path.absolute().parent.iterdir():
            if folder.name.startswith(_prefix(path)) and folder.name.endswith(ENDING):
                _remove_if_left(folder)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder, and the lock on it. Another run may take the folder for a leftover before it is locked."""
    for _ in range(ATTEMPTS):
        folder = path.absolute().with_name(f"{_prefix(path)}{secrets.token_hex(4)}{ENDING}")
        folder.mkdir()
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # of a disk without locks, where nothing is taken for a leftover
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / LOCK).exists():
                return folder, lock
            os.close(lock)
    raise OSError(f"no folder can be made next to {path}")


def _remove_if_left(folder: Path) -> None:
    """Delete the folder if the run that made it is gone."""
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
    """Long names are told apart by a digest."""
    return f".{path.name[:40]}.{hashlib.sha256(path.name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}."
