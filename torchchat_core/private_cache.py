"""Check that compiled code in the cache, which runs as soon as it is loaded, can come only from the user or root.

A file is used only if it and every folder and link on its path are owned by the user or root and writable by nobody
else. Folders with the sticky bit, such as /tmp, and groups whose only member is the user are safe.
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
MAX_LINKS = 40  # in a chain of symbolic links
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
FIX = "set XDG_CACHE_HOME to a folder that only you can write, or correct its owner and mode"


def foreign_fault(path: Path) -> str | None:
    """Return why another user could have written a file or folder; None if only the user and root could.

    A path that does not exist is judged by its parent folders. Systems without numeric user ids are not checked.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        faults = (_fault(each) for each in _path_components(path.absolute()))
        return next((fault for fault in faults if fault is not None), None)
    except OSError as error:
        return f"{path} cannot be checked: {error.strerror or error}"


def code_folder(kind: str, key: str) -> Path:
    """Return the folder for compiled code of a kind with a key; `make_code_folder` creates it.

    It is in the cache folder. If another user could have written there, it is in a temporary folder of this process,
    and a warning is logged once.
    """
    folder = cache_folder() / kind / key
    fault = _folder_fault(folder)
    if fault is None:
        return folder
    _warn_once(fault)
    return _temporary_folder() / kind / key


def private_path(kind: str, name: str) -> Path:
    """Return the path of a file in the cache that is expensive to make and runs as code.

    Raises `TorchchatError` if another user could have written it.
    """
    path = cache_folder() / kind / name
    fault = foreign_fault(path)
    if fault is not None:
        raise TorchchatError(f"{path.parent} is not used for exported models: {fault}", FIX)
    return path


def check_compiler_cache() -> None:
    """Raise `TorchchatError` if another user could have written to the cache of PyTorch's compiler.

    By default, that is a folder in /tmp with a predictable name.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    fault = foreign_fault(Path(os.environ.get(COMPILER_CACHE) or default_cache_dir()))
    if fault is not None:
        raise TorchchatError(f"PyTorch's compiler is not used: {fault}",
                             f"set {COMPILER_CACHE} to a folder that only you can write")


def make_code_folder(folder: Path) -> None:
    """Create a folder that `code_folder` returned, or one in it, with mode 0700.

    Raises `OSError`, and `TorchchatError` if another user created a folder on its path in the meantime.
    """
    make_folder(folder)
    fault = foreign_fault(folder)
    if fault is not None:
        raise TorchchatError(f"{folder} is not used for compiled code: {fault}", FIX)
    folder.chmod(0o700)


def _folder_fault(folder: Path) -> str | None:
    fault = foreign_fault(folder)
    if fault is not None or not folder.is_dir() or not hasattr(os, "getuid"):
        return fault
    try:
        return next((found for file in folder.iterdir() if (found := _fault(file)) is not None), None)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror or error}"


def _path_components(path: Path, links: int = MAX_LINKS) -> Iterator[Path]:
    """Yield every folder and link from the root to `path`, and the path itself."""
    current = Path(path.anchor)
    yield current
    for part in path.parts[1:]:
        current = current.parent if part == ".." else current / part
        yield current
        if current.is_symlink():
            if links == 0:
                raise OSError(f"{path} has too many symbolic links")
            yield from _path_components(current.parent / current.readlink(), links - 1)
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
    """Return True for the user's private group, which many systems create, if it has no other members."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@functools.cache
def _warn_once(fault: str) -> None:
    log.warning("the cache folder is not used for compiled code, so every process compiles it again: %s; %s",
                fault, FIX)


@functools.cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="torchchat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
