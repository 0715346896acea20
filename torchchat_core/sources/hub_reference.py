"""What names a model on a Hugging Face hub: owner/name, with a revision and a file where one is meant."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from torchchat_core.errors import TorchchatError, quoted, quoted_path

PUBLIC_HUB = "https://huggingface.co"
PUBLIC_HOSTS = ("huggingface.co", "hf.co")
DEFAULT_REVISION = "main"
PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
NAME = re.compile(rf"{PART}/{PART}", re.ASCII)
# What every file system takes, and no terminal obeys: no control character, none that turns the text's direction.
PATH_PART = re.compile(r"[^/\\\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069:*?\"<>|]{1,255}")
WITH_DIGEST = re.compile(r"(?P<file>.+)#sha256=(?P<digest>[0-9A-Fa-f]{64})", re.DOTALL)
ENDINGS_OF_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
NO_OWNERS = ("api", "blog", "collections", "datasets", "docs", "models", "organizations", "papers", "spaces", "tasks")


@dataclass(frozen=True)
class HubReference:
    """A repository of a hub, and what of it is meant."""

    repository: str  # "owner/name"
    revision: str | None = None  # branch, tag or commit; None: the main branch
    file: str | None = None  # path in the repository; None: the model that the repository is
    sha256: str | None = None  # that the file has to have

    @property
    def text(self) -> str:
        """As a user types it: "hf:owner/name@revision:file#sha256=HEX"."""
        return f"hf:{self.location}"

    @property
    def location(self) -> str:
        """As it stands in a `ModelRef`."""
        revision = f"@{self.revision}" if self.revision else ""
        digest = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"{self.repository}{revision}{f':{self.file}' if self.file else ''}{digest}"


def parse_hub_location(location: str) -> HubReference:
    """The parts of "owner/name@revision:file#sha256=HEX". Raises `TorchchatError` for what no hub has, or no folder
    may hold."""
    head, colon, file = location.partition(":")
    match = WITH_DIGEST.fullmatch(file)
    file, digest = (match["file"], match["digest"].lower()) if match else (file, None)
    repository, at, revision = head.partition("@")
    if not NAME.fullmatch(repository) or "--" in repository or ".." in repository or repository.endswith(".git"):
        raise TorchchatError(f"{quoted(repository)} is no name of a repository", "name it as owner/name")
    if at and (not is_safe_path(revision) or "@" in revision):
        raise TorchchatError(f"{quoted(revision)} is no revision of {repository}",
                             "write a branch, a tag or a commit after the @")
    if colon and not is_safe_path(file):
        raise TorchchatError(f"{quoted_path(file)} is no path of a file in {repository}",
                             "write the file's path in the repository after the colon")
    return HubReference(repository, revision if at and revision != DEFAULT_REVISION else None, file or None, digest)


def is_safe_path(path: str) -> bool:
    """Whether `path` stays inside the folder that it is put below, on every system."""
    return len(path) < 1024 and all(PATH_PART.fullmatch(part) and part not in (".", "..") for part in path.split("/"))


def hub_endpoint() -> str:
    """Where the hub is: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")


def check_endpoint() -> None:
    """Raises `TorchchatError` where HF_ENDPOINT is no address."""
    try:
        parts = urlsplit(hub_endpoint())
        is_address = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or any(char.isspace() or not char.isprintable() for char in hub_endpoint()):
        raise TorchchatError(f"HF_ENDPOINT is {quoted_path(hub_endpoint())}, which is no address of a hub",
                             f"it has to be like {PUBLIC_HUB}; without it, that is the hub")


def parse_hub_url(url: str) -> HubReference | None:
    """What a page or file of the hub, as a browser shows its address, refers to; None for any other URL."""
    try:
        found, endpoint = urlsplit(url), urlsplit(hub_endpoint())
    except ValueError:
        return None
    public = found.scheme == "https" and found.netloc.lower() in PUBLIC_HOSTS and endpoint.netloc in PUBLIC_HOSTS
    if not public and (found.scheme, found.netloc.lower()) != (endpoint.scheme, endpoint.netloc.lower()):
        return None
    parts = [unquote(part) for part in found.path.removeprefix(endpoint.path).strip("/").split("/")]
    if len(parts) < 2 or parts[0] in NO_OWNERS:
        return None
    repository, rest = "/".join(parts[:2]), parts[2:]
    if found.fragment:
        digest = WITH_DIGEST.fullmatch(f"{rest[-1]}#{found.fragment}") if len(rest) > 2 else None
        if digest is None:
            return None  # which the source of addresses refuses, with the reason
        rest[-1] = digest[0]
    if len(parts) == 2 and not public and parts[1].lower().endswith(ENDINGS_OF_FILES):
        return None  # a file of a server that serves other things too
    if not rest or (rest[0] == "tree" and len(rest) == 2):
        return parse_hub_location("@".join([repository, *rest[1:]]))
    if rest[0] in ("resolve", "blob") and len(rest) > 2:
        return parse_hub_location(f"{repository}@{rest[1]}:{'/'.join(rest[2:])}")
    return None
