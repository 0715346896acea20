"""What names a single file on the web, and where a copy of it is kept."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.small_files import write_whole
from torchchat_core.sources.hub_cache import delete_folder
from torchchat_core.sources.hub_reference import hub_endpoint

SHA256 = re.compile(r"[0-9a-f]{64}")
RECORD = "origin.json"
MAXIMUM_RECORD = 1 << 16  # bytes


@dataclass(frozen=True)
class UrlFile:
    """A file by its address."""

    url: str  # without the fragment
    name: str  # of the copy
    sha256: str | None = None  # that the content has to have

    @classmethod
    def parse(cls, text: str) -> UrlFile:
        """Of an address with or without "#sha256=HEX". Raises `TorchchatError` where it is malformed, not encrypted,
        or names no file."""
        url, fragment = urldefrag(text)
        host = _host(text)
        check_encrypted(url)
        name = re.sub(r"[^\w.+-]", "_", unquote(urlsplit(url).path).rpartition("/")[2], flags=re.ASCII).lstrip(".-")
        if not name or len(name) > 200:
            raise TorchchatError(f"{quoted_path(url)} names no file of {host}", "give the address of the file itself")
        if name.endswith((".incomplete", ".lock")) or name == RECORD:
            raise TorchchatError(f"{quoted(name)} is no name of a model", "give the address of a file of weights")
        digest = fragment.removeprefix("sha256=").lower()
        if fragment and (not fragment.startswith("sha256=") or not SHA256.fullmatch(digest)):
            raise TorchchatError(f"#{fragment!s:.100} is no digest", "write #sha256= and 64 hexadecimal digits")
        return cls(url, name, digest or None)


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TorchchatError(f"{quoted_path(url)} is no address: {error}") from None
    if not host or port == 0 or any(character.isspace() or not character.isprintable() for character in url):
        raise TorchchatError(f"{quoted_path(url)} is no address of a file", "it has to be like https://host/path/file.gguf")
    if parts.username is not None:
        raise TorchchatError("the address holds a user's name or password, which torchchat does not send",
                             "download the file with another program and name it here")
    return host


def check_encrypted(url: str) -> None:
    """Raises `TorchchatError` for a URL that is neither https nor on this machine nor of the user's own HF_ENDPOINT."""
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        return
    if url.startswith(f"{hub_endpoint()}/"):
        return
    raise TorchchatError(f"{quoted_path(url.partition('?')[0])} is not https: what came from there could have been "
                         "changed "
                         "on the way", "use an https address; http is taken for this machine's own servers alone")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by its very name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class KeptFile:
    """The copy of a file, in a folder of its own below `base`: its record, and while it is fetched a partial file."""

    origin: UrlFile
    base: Path

    @property
    def folder(self) -> Path:
        return self.base / hashlib.sha256(self.origin.url.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        return self.folder / self.origin.name

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.origin.name}.incomplete"

    @property
    def lock(self) -> Path:
        return self.folder / ".lock"

    def record(self) -> dict[str, Any]:
        """Of the address, its etag and, once the file is complete, size and sha256; empty where there is none."""
        return read_record(self.folder)

    def write_record(self, **values: Any) -> None:
        write_whole(self.folder / RECORD, json.dumps({"url": self.origin.url, **values}))

    def is_here(self) -> bool:
        """Whether all of the file is here, and is the one that is asked for."""
        record = self.record()
        digest = str(record.get("sha256"))
        if record.get("url") != self.origin.url or not SHA256.fullmatch(digest):
            return False
        try:
            size = self.path.stat().st_size
        except OSError:
            return False
        return size == record.get("size") and self.origin.sha256 in (None, digest)

    def is_another(self) -> bool:
        """Whether a complete copy is here, but not the one that is asked for by its digest."""
        return not self.is_here() and replace(self, origin=replace(self.origin, sha256=None)).is_here()

    def remove(self) -> int:
        """Deletes the folder; bytes that became free."""
        return delete_folder(self.folder)


def read_record(folder: Path) -> dict[str, Any]:
    """What is recorded of the copy in a folder; empty where that is missing or damaged."""
    try:
        with (folder / RECORD).open(encoding="utf-8") as file:
            found = json.loads(file.read(MAXIMUM_RECORD))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
