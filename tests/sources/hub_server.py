"""A Hugging Face hub, and a plain file server, on this machine: the routes that huggingface_hub and torchchat use.

Large files (`large`) are answered as the real hub answers those of Git LFS: a redirect to another host, with the
sha256 as etag.
The switches below make it fail as networks, hubs and disks fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """A repository at one commit; `revisions` are other branches and tags."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    large: tuple[str, ...] = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in {"main": self.files, **self.revisions}.items():
            digest = hashlib.sha1()
            for path in sorted(files):
                digest.update(path.encode() + b"\0" + files[path])
            commit = digest.hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class FakeHub:
    """What the server holds, what it was asked, and how it misbehaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)  # below /files/
    accounts: dict[str, set[str]] = field(default_factory=dict)  # token -> gated and private repositories it may read
    requests: list[str] = field(default_factory=list)  # "GET /path"
    ranges: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # that came to /lfs/ and /files/
    bytes_sent: int = 0  # of files

    budget: int | None = None  # bytes of files until the connection breaks
    cuts: int | None = None  # so often; None: always
    flip: str | None = None  # the file of this name arrives with one byte changed
    failures: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)  # path part, status, headers: once
    refused: dict[str, int] = field(default_factory=dict)  # path part -> status, always
    delay: float = 0.0  # seconds before every block
    no_head: bool = False
    media_type: str = "application/octet-stream"
    etags: bool = True  # of plain files
    lengths: bool = True  # Content-Length of plain files
    redirect: str | None = None  # where plain files are said to be
    url: str = ""

    def reset(self) -> None:
        """All is well again."""
        self.budget = self.cuts = self.flip = self.redirect = None
        self.failures, self.refused, self.delay = [], {}, 0.0

    @contextlib.contextmanager
    def cut_after(self, count: int) -> Iterator[None]:
        """Within it, connections break after so many bytes of files, and at once from then on."""
        self.budget, self.cuts = count, None
        try:
            yield
        finally:
            self.budget = None


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        for index, (part, status, headers) in enumerate(hub.failures):
            if part in path:
                del hub.failures[index]
                return self._answer(status, headers)
        for part, status in hub.refused.items():
            if part in path:
                return self._answer(status, {})
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/").split("/"))
        if path.startswith("/files/"):
            return self._plain(path.removeprefix("/files/"))
        if path.startswith("/lfs/"):
            return self._large(path.removeprefix("/lfs/"))
        parts = path.strip("/").split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._answer(404, {})

    # ---- the hub --------------------------------------------------------------------------------------------------

    def _readable(self, name: str, *, content: bool) -> Repository | None:
        """The repository, or None after an error was sent."""
        authorization = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if authorization and authorization not in self.hub.accounts:
            self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        may = name in self.hub.accounts.get(authorization, set())
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not may):
            self._answer(404 if authorization else 401, {"X-Error-Code": "RepoNotFound",
                                                         "X-Error-Message": "Repository not found"})
            return None
        if content and repository.gated and not may:
            self._answer(403 if authorization else 401, {
                "X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted."})
            return None
        return repository

    def _api(self, parts: list[str]) -> None:
        name, revision = "/".join(parts[:2]), "/".join(parts[3:]) or "main"
        repository = self._readable(name, content=False)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        siblings = [self._sibling(path, content, repository) for path, content in files.items()]
        if "blobs" not in parse_qs(urlsplit(self.path).query):
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        body = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repository.private,
                "gated": repository.gated, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    @staticmethod
    def _sibling(path: str, content: bytes, repository: Repository) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
        if path.endswith(repository.large):
            found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return found

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._readable(name, content=True)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if path not in files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[path]
        if not path.endswith(repository.large):
            return self._send(path, content, {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        return self._answer(302, {
            "X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs/{name}/{commit}/{path}"})

    def _large(self, rest: str) -> None:
        owner, name, commit, path = rest.split("/", 3)
        self.hub.tokens.append(self.headers.get("Authorization", ""))
        found = self.hub.repositories[f"{owner}/{name}"].at(commit)
        content = found[1][path] if found else b""
        self._send(path, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    # ---- plain files ----------------------------------------------------------------------------------------------

    def _plain(self, path: str) -> None:
        self.hub.tokens.append(self.headers.get("Authorization", ""))
        if self.hub.redirect is not None:
            return self._answer(302, {"Location": self.hub.redirect})
        if self.hub.no_head and self.command == "HEAD":
            return self._answer(405, {})
        content = self.hub.plain.get(path)
        if content is None:
            return self._answer(404, {})
        etag = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if self.hub.etags else {}
        return self._send(path, content, etag)

    # ---- answers --------------------------------------------------------------------------------------------------

    def _send(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        start, asked = 0, self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if asked and condition in (None, headers.get("ETag")):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.hub.ranges.append(asked)
            if start >= len(content):
                return self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if path == self.hub.flip:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
        return self._answer(206 if start else 200, headers, content[start:], is_file=True)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"", *, is_file: bool = False) -> None:
        self.send_response(status)
        lengths = self.hub.lengths or not is_file
        for name, value in ({"Content-Type": self.hub.media_type} | headers).items():
            self.send_header(name, value)
        self.send_header(*(("Content-Length", str(len(body))) if lengths else ("Connection", "close")))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if is_file:
                self._write_blocks(body)
            else:
                self.wfile.write(body)
        except ConnectionError:  # the other side has gone
            self.close_connection = True

    def _write_blocks(self, body: bytes, block: int = 4096) -> None:
        hub = self.hub
        for position in range(0, len(body), block):
            piece = body[position:position + block]
            time.sleep(hub.delay)
            if hub.budget is not None:
                piece = piece[:hub.budget]
                hub.budget -= len(piece)
            hub.bytes_sent += len(piece)  # before they are sent: who has them may look at once
            self.wfile.write(piece)
            if hub.budget == 0:
                if hub.cuts is not None:
                    hub.cuts -= 1
                    hub.budget = None if hub.cuts == 0 else 4 * block
                self.wfile.flush()
                self.close_connection = True
                return


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub on a free port of this machine, until the end of the block."""
    hub = FakeHub()
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
