"""Reading the small files beside a model's weights, none of which is trusted."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted_path

log = logging.getLogger(__name__)
MAXIMUM_BYTES = 256 * 1024 * 1024  # several times the largest tokenizer in use
COPY_AGAIN = "download or copy the model again"
LFS_POINTER = b"version https://git-lfs"


def expanded(path: str) -> Path:
    """The path that a user typed, with ~ as the home folder. Raises `TorchchatError` for a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise TorchchatError(f"the home folder in {quoted_path(path)} cannot be found",
                             "write the whole path") from None


def output_file(flag: str, text: str) -> Path:
    """The file that the value of a flag names. Raises `TorchchatError`, before any work is done, where none can be
    written there."""
    path = expanded(text)
    given, folder = f"{flag} is {quoted_path(text)}", path.absolute().parent
    try:
        if path.is_dir():
            raise TorchchatError(f"{given}, which is a folder", "give the name of the file in it")
        if path.exists() and not path.is_file():
            raise TorchchatError(f"{given}, which is no ordinary file, so it is not replaced",
                                 "give the name of a new file")
        if not folder.is_dir():
            raise TorchchatError(f"{given}; there is no folder {quoted_path(str(path.parent))}", "make it first")
        with tempfile.TemporaryFile(dir=folder):
            return path
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise TorchchatError(f"{given}, a name that is too long for this system", "choose a shorter one") from None
        raise TorchchatError(f"{given}; no file can be written into {quoted_path(str(folder))}: {error.strerror}",
                             "choose another folder") from None


def existing_file(flag: str, text: str) -> Path:
    """Return the file named by the value of a flag. Raises `TorchchatError` if it does not exist."""
    path = expanded(text)
    if not is_file(path):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise TorchchatError(f"{flag}: the file {quoted_path(str(path))} {what}", "give the path of a file")
    return path


def is_file(path: Path) -> bool:
    """Whether there is such a file: none has a path that is too long, or in a folder that may not be looked into."""
    try:
        return path.is_file()
    except OSError:
        return False


def cache_folder() -> Path:
    """Where torchchat keeps what need not be made twice."""
    return (xdg_folder("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchchat"


def xdg_folder(variable: str) -> Path | None:
    """Return the folder in an XDG variable; None if it is unset or relative, which the specification says to ignore."""
    value = os.environ.get(variable)
    return Path(value) if value and Path(value).is_absolute() else None


def make_folder(path: Path) -> None:
    """Create a folder and its parents; the cache folder and folders in it get mode 0700. Raises `OSError`."""
    cache = cache_folder()
    for folder in (*reversed(path.parents), path):
        if folder == cache or folder.is_relative_to(cache):
            folder.mkdir(mode=0o700, exist_ok=True)
        elif not folder.exists():
            folder.mkdir(exist_ok=True)


def make_private(*paths: Path) -> None:
    """Make existing files readable and writable only by their owner; log a warning if that fails."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_IMODE(path.stat().st_mode) & 0o077:
                continue
            try:
                path.chmod(0o600)
            except OSError as error:
                log.warning("other users can read %s, and its mode cannot be changed: %s", path, error.strerror)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes text (as UTF-8) or bytes to `path` whole or not at all. Raises `TorchchatError` where that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        beside.replace(path)
    except (OSError, ValueError) as error:  # ValueError: what UTF-8 cannot say, or a NUL in the path
        with contextlib.suppress(OSError, ValueError):
            beside.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise TorchchatError(f"cannot write {quoted_path(str(path))}: {reason}") from None


def read_file(path: Path, fix: str = COPY_AGAIN) -> bytes:
    """The content of `path`. Raises `TorchchatError` where it is missing, unreadable, empty, a Git LFS pointer or
    larger than `MAXIMUM_BYTES`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise TorchchatError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise TorchchatError(f"{path} is empty", fix)
    if len(content) > MAXIMUM_BYTES:
        raise TorchchatError(f"{path} has more than {MAXIMUM_BYTES} bytes, which no such file has")
    if content.startswith(LFS_POINTER):
        raise TorchchatError(f"{path} is a Git LFS pointer, not the file itself",
                             "run `git lfs pull` in its folder, or download the model again")
    return content


def read_text(path: Path, fix: str = COPY_AGAIN) -> str:
    """Return the content of `path` as UTF-8 text. Raises `TorchchatError` as `read_file` does."""
    try:
        return read_file(path, fix).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TorchchatError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
                             fix) from error


def written_text(content: bytes, name: str) -> str:
    r"""Decode text that a user wrote to a file or pipe: UTF-8, without a byte order mark, with "\n" line endings.

    Raises `TorchchatError`, which calls the text `name`, if it is in another encoding.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            found = "it begins with a byte order mark of UTF-16"
        else:
            found = f"byte {error.start} is {content[error.start]:#04x}"
        raise TorchchatError(f"{name} is not UTF-8 text: {found}", "save it as UTF-8") from None
    if "\0" in text:
        raise TorchchatError(f"{name} is not UTF-8 text: byte {text.index(chr(0))} is 0x00, as in UTF-16",
                             "save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, fix: str = COPY_AGAIN) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `TorchchatError` with `fix` if the file contains anything else."""
    text = read_text(path, fix)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise TorchchatError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}", fix
                             ) from error
    except (ValueError, RecursionError) as error:
        raise TorchchatError(f"{path} is not JSON: {error}", fix) from error
    if not isinstance(content, dict):
        raise TorchchatError(f"{path} holds a JSON {type(content).__name__}; it has to be an object", fix)
    return content
