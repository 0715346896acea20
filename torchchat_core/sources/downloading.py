"""Fetching one file over HTTP: goes on where it was, follows redirects to safe places alone, tries again within reason.

Of the standard library, so that it behaves alike whatever HTTP library huggingface_hub uses. huggingface_hub's own
download begins each file from its start when a run was cut off (seen in 2.4.0), which torchchat has to do better.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import http.client
import importlib
import re
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from torchchat_core import __version__
from torchchat_core.amounts import bytes_text
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.small_files import make_folder
from torchchat_core.sources.url_file import check_encrypted, is_loopback

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row without a byte
FIRST_ATTEMPTS = 3  # to reach a server at all: without a network, nobody wants to wait long for that to be said
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
LONGEST_PAUSE = 60.0  # seconds that a server's Retry-After is obeyed
NOT_SATISFIABLE = 416  # HTTP's status where a range begins beyond the end of the file
BLOCK = 1 << 18  # bytes read at once
LOOK_AT_DISK = 1 << 26  # bytes of a file of unknown size between two looks at what is free
RESERVE = 1_000_000_000  # bytes that a file of unknown size leaves free
REDIRECTS = 10
BUSY = (408, 425, 429, 500, 502, 503, 504)
USER_AGENT = f"torchchat/{__version__}"
Result = TypeVar("Result")


class HTTPFailure(Exception):
    """A server's refusal, for the caller to explain. `status` is HTTP's; `headers` are as the server sent them."""

    def __init__(self, status: int, headers: Mapping[str, str], url: str) -> None:
        super().__init__(f"HTTP status {status} of {url}")
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}


class ConnectionFailure(Exception):
    """No answer, or one that was cut off."""


class Cancelled(Exception):
    """Another file failed, or the user interrupted."""


@dataclass(frozen=True)
class Download:
    """One file to fetch, and where its bytes go until it is complete."""

    url: str
    partial: Path
    name: str  # for messages
    size: int | None  # bytes; None: what the server says
    headers: Mapping[str, str] = field(default_factory=dict)
    validator: str | None = None  # the etag that the partial file is of, where the URL alone does not say it


def download(wanted: Download, advance: Callable[[int], None], cancelled: threading.Event) -> None:
    """Fetches what is missing of the file. `advance` is told of bytes, negative ones where some are thrown away.

    Raises `HTTPFailure`, `ConnectionFailure` after `ATTEMPTS` without a byte more than there ever was, `Cancelled`,
    and `TorchchatError` where the disk is full or the server has another number of bytes. The partial file stays for
    the next time.
    """
    advance(length(wanted.partial))
    attempts = _Attempts(furthest=length(wanted.partial))
    while wanted.size is None or length(wanted.partial) != wanted.size:
        try:
            if _continue(wanted, advance, cancelled):
                return
        except (HTTPFailure, ConnectionFailure) as failure:
            pause = attempts.pause_after(failure, wanted)
            if isinstance(failure, HTTPFailure) and failure.status == NOT_SATISFIABLE:
                _discard(wanted.partial, advance)
            if cancelled.wait(pause):
                raise Cancelled from None


@dataclass
class _Attempts:
    """How a download went until now. What was thrown away and comes again is no progress."""

    furthest: int  # bytes
    failures: int = 0  # since then
    begun_anew: bool = False

    def pause_after(self, failure: HTTPFailure | ConnectionFailure, wanted: Download) -> float:
        """Seconds until the next attempt. Raises the failure, or a `TorchchatError`, where there is to be none."""
        have = length(wanted.partial)
        self.failures = 1 if have > self.furthest else self.failures + 1
        self.furthest = max(self.furthest, have)
        if isinstance(failure, HTTPFailure) and failure.status == NOT_SATISFIABLE:
            if not have or self.begun_anew:
                _check_size(wanted, whole_number(failure.headers.get("content-range", "").rpartition("/")[2]))
                raise failure
            self.begun_anew = True
            return PAUSE
        pause = _pause_before_next(failure, self.failures)
        if pause is None:
            raise failure
        return pause


def trying_again(action: Callable[[], Result]) -> Result:
    """The action's result, tried again while a server is busy or silent. Raises what the last attempt raised."""
    failures = 0
    while True:
        try:
            return action()
        except (HTTPFailure, ConnectionFailure) as failure:
            failures += 1
            pause = _pause_before_next(failure, failures)
            if pause is None or (isinstance(failure, ConnectionFailure) and failures >= FIRST_ATTEMPTS):
                raise
            time.sleep(pause)


def _pause_before_next(failure: HTTPFailure | ConnectionFailure, failures: int) -> float | None:
    """Seconds, or None where trying again is of no use."""
    if failures >= ATTEMPTS or (isinstance(failure, HTTPFailure) and failure.status not in BUSY):
        return None
    asked = seconds_to_wait(failure.headers) if isinstance(failure, HTTPFailure) else None
    if asked is not None and asked > LONGEST_PAUSE:
        return None
    return PAUSE * 2 ** (failures - 1) if asked is None else max(asked, 0.0)


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """What a busy server asks for, by Retry-After or by the draft header RateLimit, which Hugging Face sends."""
    limit = re.search(r"r=0\s*;\s*t=([0-9]{1,9})", headers.get("ratelimit", ""))
    text = limit[1] if limit else headers.get("retry-after", "").strip()
    seconds = whole_number(text)
    if seconds is not None:
        return float(seconds)
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(text).timestamp() - time.time()
    return None


def whole_number(text: str) -> int | None:
    """The number that a header holds; None for anything else, and for one that no file has bytes of."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


# ---- one request --------------------------------------------------------------------------------------------------


def _continue(wanted: Download, advance: Callable[[int], None], cancelled: threading.Event) -> bool:
    """Appends what the server sends; whether that is the end of a file whose size nobody knew."""
    start = length(wanted.partial)
    if wanted.size is not None and start > wanted.size:
        start = _discard(wanted.partial, advance)
    headers = dict(wanted.headers)
    if start:
        headers["Range"] = f"bytes={start}-"
        if wanted.validator:
            headers["If-Range"] = wanted.validator
    with open_url(wanted.url, headers) as response:
        _check_is_file(response, wanted, start)
        if start and response.status == 200:
            start = _discard(wanted.partial, advance)
        announced = _announced(response, start)
        _check_size(wanted, announced)
        total = announced if wanted.size is None else wanted.size
        _append(response, wanted, total, advance, cancelled)
    have = length(wanted.partial)
    if total is not None and have < total:
        raise ConnectionFailure(f"the connection broke after {have} of {total} bytes")
    return True


def _check_is_file(response: http.client.HTTPResponse, wanted: Download, start: int) -> None:
    """Raises where the answer is neither the file nor the rest of it from `start` on."""
    packed = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise TorchchatError(f"{urlsplit(wanted.url).netloc} sends {wanted.name} packed (Content-Encoding "
                             f"{quoted(packed)}), which it was not asked to",
                             "download the file with another program and name it here")
    if response.status != 200 and not (start and _goes_on_at(response, start)):
        raise ConnectionFailure(f"the server answered with another part of the file (HTTP status {response.status})")


def _check_size(wanted: Download, found: int | None) -> None:
    if wanted.size is not None and found is not None and found != wanted.size:
        raise TorchchatError(f"{urlsplit(wanted.url).netloc} has {found} bytes of {wanted.name}, and {wanted.size} "
                             "were announced", "the file is being changed, or its copy is damaged; try again later")


def _append(response: http.client.HTTPResponse, wanted: Download, total: int | None, advance: Callable[[int], None],
            cancelled: threading.Event) -> None:
    with writing(wanted.partial), wanted.partial.open("ab") as file:
        have = file.tell()
        looked_at = have
        while block := _read(response):
            if cancelled.is_set():
                raise Cancelled
            if total is not None and have + len(block) > total:
                raise TorchchatError(f"the server sends more than the {total} bytes that {wanted.name} has",
                                     "the file is being changed; try again later")
            file.write(block)
            have += len(block)
            advance(len(block))
            if total is None and have - looked_at >= LOOK_AT_DISK:
                looked_at = have
                _check_reserve(wanted, have)


def _check_reserve(wanted: Download, have: int) -> None:
    """Raises `TorchchatError` where the disk is nearly full."""
    try:
        free = shutil.disk_usage(wanted.partial.parent).free
    except OSError:
        return
    if free < RESERVE:
        raise TorchchatError(f"{wanted.name} has {bytes_text(have)} until now, the server does not say how many there "
                             f"are, and {quoted_path(str(wanted.partial.parent))} has {bytes_text(free)} free",
                             "make room, or choose another disk with XDG_CACHE_HOME; torchchat remove deletes what "
                             "has come")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFailure(_reason(error)) from None


def _goes_on_at(response: http.client.HTTPResponse, start: int) -> bool:
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _announced(response: http.client.HTTPResponse, start: int) -> int | None:
    """Bytes of the whole file."""
    rest = whole_number(response.headers.get("Content-Length", ""))
    return None if rest is None else start + rest


def _discard(partial: Path, advance: Callable[[int], None]) -> int:
    advance(-length(partial))
    partial.unlink(missing_ok=True)
    return 0


def length(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ---- connections --------------------------------------------------------------------------------------------------


@contextmanager
def open_url(url: str, headers: Mapping[str, str], method: str = "GET") -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, redirects followed. Raises `HTTPFailure`, `ConnectionFailure`, and `TorchchatError`
    where the connection would not be encrypted."""
    check_encrypted(url)
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT, **headers}, method=method)
    try:
        response = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise HTTPFailure(error.code, dict(error.headers.items()), error.url or url) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionFailure(_reason(error)) from None
    with response:
        yield response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To https alone; what permits access goes to no other host."""

    max_redirections = REDIRECTS

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int,  # noqa: ARG002
                         msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:  # noqa: ARG002
        check_encrypted(newurl)
        if is_loopback(urlsplit(newurl).hostname or "") and not is_loopback(urlsplit(req.full_url).hostname or ""):
            raise TorchchatError(f"{quoted_path(req.full_url.partition('?')[0])} redirects to this machine, which a "
                                 "server "
                                 "elsewhere has no reason to", "use another address")
        new = urllib.request.Request(newurl, headers=dict(req.header_items()), method=req.get_method())
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        new.remove_header("Host")
        return new


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=_tls_context()))


@functools.cache  # it takes 30 ms
def _tls_context() -> ssl.SSLContext:
    """With the system's certificates; where Python finds none, those that huggingface_hub's HTTP library uses."""
    context = ssl.create_default_context()
    if context.get_ca_certs() or ssl.get_default_verify_paths().capath:
        return context
    with suppress(ImportError):
        found: ssl.SSLContext = importlib.import_module("truststore").SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return found
    with suppress(ImportError):
        context.load_verify_locations(importlib.import_module("certifi").where())
    return context


def _reason(error: Exception) -> str:
    """Why there is no connection, in a few words."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer for {TIMEOUT:.0f} seconds"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {cause.verify_message}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


# ---- the disk -----------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system within it into a `TorchchatError` that says what to do."""
    try:
        yield
    except OSError as error:
        fix = "check who owns the folder, or choose another with HF_HOME or XDG_CACHE_HOME"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "make room and run the same command again: it goes on where it was"
        raise TorchchatError(f"cannot write {quoted_path(str(path))}: {error.strerror or error}", fix) from None


@contextmanager
def locked(path: Path, cancelled: threading.Event | None = None) -> Iterator[None]:
    """Waits until no other process holds the lock file `path`, and holds it."""
    from filelock import FileLock, Timeout

    with writing(path):
        make_folder(path.parent)
        lock = FileLock(path, mode=0o664)
        while not lock.is_locked:
            with suppress(Timeout):
                lock.acquire(timeout=1)
            if cancelled is not None and cancelled.is_set():
                lock.release()
                raise Cancelled
    try:
        yield
    finally:
        lock.release()


def check_free_space(folder: Path, needed: int, name: str) -> None:
    """Raises `TorchchatError` where the file system of `folder`, which may not exist yet, has less than `needed`."""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        return
    if needed > free:
        raise TorchchatError(f"{name} needs {bytes_text(needed)} more, and {quoted_path(str(existing))} has "
                             f"{bytes_text(free)} free",
                             "make room (torchchat remove MODEL), or choose another disk with HF_HOME")


def digest_of(path: Path, kind: str, cancelled: threading.Event | None = None) -> str:
    """The file's "sha256", or the "git" name of its content: sha1 of "blob SIZE", a zero byte and the content."""
    digest = hashlib.sha256()
    if kind == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if cancelled is not None and cancelled.is_set():
                raise Cancelled
            digest.update(block)
    return digest.hexdigest()
