"""Compiled code in the cache folder, which runs as soon as it is loaded: only the user and root may have written it.

A file is used only if it and every folder and link on the way to it belong to the user or root, and nobody else can
write them. A folder with the sticky bit, as /tmp has, and a group of which the user is the only member are no danger.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import cache_folder, make_folder

log = logging.getLogger(__name__)
MOST_LINKS = 40  # that lead to each other
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
OTHERS = "set XDG_CACHE_HOME to a folder that only you can write, or correct its owner and mode"


def foreign_fault(path: Path) -> str | None:
    """Return why somebody else could have written a file or folder; None if only the user and root could.

    What does not exist is judged by the folders above it. Systems without numeric user ids are not checked.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        faults = (_fault(each) for each in _way(path.absolute()))
        return next((fault for fault in faults if fault is not None), None)
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror or error}"


def code_folder(kind: str, key: str) -> Path:
    """Return the folder for compiled code of a kind with a key: below the cache folder, or, if somebody else could
    have written there, below a temporary folder of this process, which a line in the log says once.

    The folder need not exist; `make_code_folder` makes it.
    """
    folder = cache_folder() / kind / key
    fault = _folder_fault(folder)
    if fault is None:
        return folder
    _say_once(fault)
    return _temporary_folder() / kind / key


def private_path(kind: str, name: str) -> Path:
    """Return the path of a file in the cache that is expensive to make and runs as code.

    Raises `TorchchatError` if somebody else could have written it.
    """
    path = cache_folder() / kind / name
    fault = foreign_fault(path)
    if fault is not None:
        raise TorchchatError(f"{path.parent} is not used for exported models: {fault}", OTHERS)
    return path


def check_compiler_cache() -> None:
    """Raise `TorchchatError` if somebody else could have written where PyTorch's compiler keeps its own code, by
    default a folder below /tmp with a name that can be guessed."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    fault = foreign_fault(Path(os.environ.get(COMPILER_CACHE) or default_cache_dir()))
    if fault is not None:
        raise TorchchatError(f"PyTorch's compiler is not used: {fault}",
                             f"set {COMPILER_CACHE} to a folder that only you can write")


def make_code_folder(folder: Path) -> None:
    """Make a folder that `code_folder` returned, or one in it, for the user alone.

    Raises `OSError`, and `TorchchatError` if somebody else made a folder on the way to it in the meantime.
    """
    make_folder(folder)
    fault = foreign_fault(folder)
    if fault is not None:
        raise TorchchatError(f"{folder} is not used for compiled code: {fault}", OTHERS)
    folder.chmod(0o700)


def _folder_fault(folder: Path) -> str | None:
    fault = foreign_fault(folder)
    if fault is not None or not folder.is_dir() or not hasattr(os, "getuid"):
        return fault
    try:
        return next((found for file in folder.iterdir() if (found := _fault(file)) is not None), None)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror or error}"


def _way(path: Path, links: int = MOST_LINKS) -> Iterator[Path]:
    """Yield every folder and link from the root to `path`, and the path itself."""
    current = Path(path.anchor)
    yield current
    for part in path.parts[1:]:
        current = current.parent if part == ".." else current / part
        yield current
        if current.is_symlink():
            if links == 0:
                raise OSError(f"{path} has too many symbolic links")
            yield from _way(current.parent / current.readlink(), links - 1)
            current = current.resolve()


def _fault(path: Path) -> str | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if found.st_uid not in (0, os.getuid()):
        return f"{path} belongs to {_user_name(found.st_uid)}"
    if stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        return None
    if found.st_mode & stat.S_IWOTH:
        return f"everybody can write {path}"
    if found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid):
        return f"its group can write {path}"
    return None


def _user_name(number: int) -> str:
    import pwd

    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user with id {number}"


@functools.cache
def _is_private_group(number: int) -> bool:
    """Return True for the group that many systems make for each user, with no other members."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@functools.cache
def _say_once(fault: str) -> None:
    log.warning("the cache folder is not used for compiled code, which is compiled anew in every process: %s; %s",
                fault, OTHERS)


@functools.cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="torchchat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
