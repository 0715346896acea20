"""Fetching a single file by its address."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from torchchat_core import progress
from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.sources.downloading import (
    ConnectionFailure,
    Download,
    HTTPFailure,
    check_free_space,
    digest_of,
    download,
    length,
    locked,
    open_url,
    trying_again,
    whole_number,
    writing,
)
from torchchat_core.sources.url_file import KeptFile

WEB_PAGES = ("text/html", "application/xhtml+xml")
NO_HEAD = (400, 401, 403, 404, 405, 501)  # with which servers, and signed addresses, refuse HEAD but not GET


@dataclass(frozen=True)
class _Answer:
    """What a server says of a file before it sends it."""

    size: int | None  # bytes
    version: str | None  # etag, or the time of the last change
    validator: str | None  # `version`, where a server has to compare it byte by byte
    media_type: str


def fetch_url_file(kept: KeptFile) -> None:
    """Fetches the file, from where an earlier run was cut off.

    Raises `TorchchatError` for whatever goes wrong; what has come stays, unless it is not the file that was meant.
    """
    with locked(kept.lock):
        if not kept.is_here():
            try:
                _fetch(kept)
            except (HTTPFailure, ConnectionFailure) as failure:
                raise _explained(failure, kept) from None


def _fetch(kept: KeptFile) -> None:
    answer = trying_again(lambda: _ask(kept.origin.url))
    if answer.media_type in WEB_PAGES:
        raise TorchchatError(f"{quoted_path(kept.origin.url)} is a web page, not a file",
                             "give the address behind the page's download button")
    _discard_another_version(kept, answer)
    with writing(kept.folder):
        kept.write_record(version=answer.version)
    if answer.size is not None:
        check_free_space(kept.folder, answer.size - min(answer.size, length(kept.partial)), kept.origin.name)
    with progress.task(kept.origin.name, answer.size, "B") as task:
        wanted = Download(kept.origin.url, kept.partial, kept.origin.name, answer.size, validator=answer.validator)
        download(wanted, task.advance, threading.Event())
    _finish(kept, answer)


def _ask(url: str) -> _Answer:
    try:
        with open_url(url, {}, "HEAD") as response:
            return _answer(response.headers)
    except HTTPFailure as failure:
        if failure.status not in NO_HEAD:
            raise
    with open_url(url, {}) as response:
        return _answer(response.headers)


def _answer(headers: Message) -> _Answer:
    etag = headers.get("ETag")
    version = etag or headers.get("Last-Modified")
    return _Answer(whole_number(headers.get("Content-Length", "")), version,
                   None if version is None or version.startswith("W/") else version,
                   headers.get("Content-Type", "").partition(";")[0].strip().lower())


def _discard_another_version(kept: KeptFile, answer: _Answer) -> None:
    """A partial file goes on only where it is a part of what the server has now, or where its digest will tell."""
    same = answer.version is not None and kept.record().get("version") == answer.version
    with writing(kept.folder):
        kept.path.unlink(missing_ok=True)
        if not same and kept.origin.sha256 is None:
            kept.partial.unlink(missing_ok=True)


def _finish(kept: KeptFile, answer: _Answer) -> None:
    size = length(kept.partial)
    if size == 0:
        raise TorchchatError(f"{quoted_path(kept.origin.url)} is an empty file", "give another address")
    digest = digest_of(kept.partial, "sha256")
    if kept.origin.sha256 not in (None, digest):
        kept.partial.unlink(missing_ok=True)
        raise TorchchatError(f"{kept.origin.name} came damaged, or is another file: its sha256 is {digest}, and "
                             f"{kept.origin.sha256} was asked for", "it was deleted; check the digest, or run the "
                             "same command again")
    with writing(kept.folder):
        kept.partial.replace(kept.path)
        kept.write_record(version=answer.version, size=size, sha256=digest)


def _explained(failure: HTTPFailure | ConnectionFailure, kept: KeptFile) -> TorchchatError:
    host, name = urlsplit(kept.origin.url).netloc, kept.origin.name
    if isinstance(failure, ConnectionFailure):
        return TorchchatError(f"cannot fetch {name} from {host}: {failure}",
                              "check the network and run the same command again: what has come already is kept")
    if failure.status in (404, 410):
        return TorchchatError(f"there is no file {quoted_path(kept.origin.url)}", "check the address in a browser")
    if failure.status in (401, 403):
        return TorchchatError(f"{host} forbids access to {name} (HTTP status {failure.status})",
                              "if the file needs a login, download it with a browser and name it here")
    if failure.status == 429:
        return TorchchatError(f"{host} takes no more requests from here for now",
                              "wait some minutes and run the same command again: what has come already is kept")
    if failure.status >= 500:
        return TorchchatError(f"{host} is out of order (HTTP status {failure.status})",
                              "run the same command again later: what has come already is kept")
    return TorchchatError(f"{host} answers with HTTP status {failure.status} for {name}",
                          "check the address in a browser")
