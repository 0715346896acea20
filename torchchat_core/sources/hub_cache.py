"""The cache of Hugging Face's tools, which torchchat shares: finding models in it and removing them from it.

    models--owner--name/refs/main                 the commit that the branch was at
    models--owner--name/snapshots/COMMIT/FILE     links to ../../blobs/DIGEST, which appear once the file is complete
    models--owner--name/blobs/DIGEST              sha256 of large files, git's sha1 of others
    models--owner--name/.torchchat/COMMIT.json    all files of the repository, written before torchchat fetches any
    models--owner--name/.torchchat/revisions/main/COMMIT  empty: the branch was there, by this file's time

Standard library alone: finding a model that is here takes milliseconds. What the cache holds was written by others.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.small_files import write_whole
from torchchat_core.sources.hub_reference import DEFAULT_REVISION, NAME, HubReference, is_safe_path

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LONGEST_PATH = 1024  # characters below a snapshot
MARKS = ".torchchat/revisions"
LARGEST_FILE = 1 << 53  # bytes; more than any file system has room for
MAXIMUM_RECORD = 64 * 1024 * 1024  # bytes; a hundred thousand files take a quarter
_writing = Lock()  # `write_whole` keeps processes apart, not threads
TRUE = ("1", "ON", "YES", "TRUE")


def hub_folder() -> Path:
    """Where Hugging Face's tools keep what they fetch, by the environment as it is now."""
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118 - variables inside are expanded below
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(chosen or os.path.join(home, "hub"))).expanduser()  # noqa: PTH118


def is_offline() -> bool:
    """Whether the user forbade the network, for this tool or for those that share its settings."""
    return any((os.environ.get(name) or "").upper() in TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository as the hub lists it."""

    path: str
    size: int  # bytes
    digest: str  # sha256 (64 digits), or git's sha1 of a blob (40 digits): the name of the blob


@dataclass(frozen=True)
class Listing:
    """All files of a repository at one commit."""

    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def sizes(self) -> dict[str, int]:
        return {path: file.size for path, file in self.files.items()}


class CachedRepository:
    """The folder of one repository."""

    def __init__(self, repository: str, hub: Path | None = None) -> None:
        self.name = repository
        self.folder = (hub or hub_folder()) / f"models--{repository.replace('/', '--')}"

    @property
    def locks(self) -> Path:
        return self.folder.parent / ".locks" / self.folder.name

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.digest

    def lock(self, file: RemoteFile) -> Path:
        """The same lock that huggingface_hub takes."""
        return self.locks / f"{file.digest}.lock"

    # ---- what is here ---------------------------------------------------------------------------------------------

    def commit(self, revision: str | None) -> str | None:
        """The commit that a branch or tag was at when it was fetched, or the commit itself; None where unknown."""
        if revision is not None and COMMIT.fullmatch(revision):
            return revision
        try:
            with open(f"{self.folder}/refs/{revision or DEFAULT_REVISION}", encoding="ascii") as file:  # noqa: PTH123
                found = file.read(64).strip()
        except (OSError, ValueError):
            return None
        return found if COMMIT.fullmatch(found) else None

    def commits_at(self, revision: str | None) -> list[str]:
        """The commit that a branch or tag is at, then those that it was at when torchchat fetched of it, newest first.

        What was fetched before a branch moved on is the branch's still, where no later state of it is here.
        """
        now = self.commit(revision)
        if revision is not None and revision == now:
            return [revision]
        marks = []
        with suppress(OSError), os.scandir(f"{self.folder}/{MARKS}/{revision or DEFAULT_REVISION}") as entries:
            marks = [(entry.stat(follow_symlinks=False).st_mtime_ns, entry.name) for entry in entries
                     if COMMIT.fullmatch(entry.name)]
        former = [name for _, name in sorted(marks, reverse=True)]
        return list(dict.fromkeys([now, *former] if now is not None else former))

    def _marks(self, revision: str | None) -> Path:
        return self.folder / MARKS / (revision or DEFAULT_REVISION)

    def commits(self) -> list[str]:
        return [name for name in _names(f"{self.folder}/snapshots") if COMMIT.fullmatch(name)]

    def revisions(self) -> dict[str, str]:
        """Branch or tag -> commit."""
        names = sorted(name for name, _ in _entries(f"{self.folder}/refs"))
        return {name: commit for name in names if is_safe_path(name) and (commit := self.commit(name))}

    def local_sizes(self, commit: str) -> dict[str, int]:
        """Path in the repository -> bytes, of the files that are here."""
        found = {}
        for name, entry in _entries(f"{self.folder}/snapshots/{commit}"):
            with suppress(OSError):  # a link whose blob is gone
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    found[name] = status.st_size
        return {name: found[name] for name in sorted(found) if is_safe_path(name)}

    def listing(self, commit: str) -> Listing | None:
        """The record of what the repository holds; None where another tool fetched it, or the record is damaged."""
        try:
            with open(f"{self.folder}/.torchchat/{commit}.json", encoding="utf-8") as file:  # noqa: PTH123
                found = json.loads(file.read(MAXIMUM_RECORD))
            files = [RemoteFile(str(entry["path"]), int(entry["size"]), str(entry["digest"]))
                     for entry in found["files"]]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return Listing(commit, {file.path: file for file in files if is_listed_well(file)})

    # ---- writing --------------------------------------------------------------------------------------------------

    def write_listing(self, listing: Listing) -> None:
        path = self.folder / ".torchchat" / f"{listing.commit}.json"
        _write(path, json.dumps({"files": [asdict(file) for file in listing.files.values()]}))

    def mark_revision(self, revision: str | None, commit: str) -> None:
        """Notes that the branch or tag is at this commit; where it was before stays noted too."""
        former = self.commit(revision)
        if revision == commit:
            return
        marks = self._marks(revision)
        marks.mkdir(parents=True, exist_ok=True)
        if former is not None and not (marks / former).exists():  # another tool fetched it
            (marks / former).touch()
        (marks / commit).touch()

    def write_revision(self, revision: str | None, commit: str) -> None:
        """Keeps what the branch or tag is at, for later use without the network."""
        if revision == commit or self.commit(revision) == commit:
            return
        path = self.folder / "refs" / (revision or DEFAULT_REVISION)
        _write(path, commit)

    def link(self, file: RemoteFile, commit: str) -> None:
        """Makes the file appear in the snapshot; where the file system has no links, its blob is moved there."""
        place, blob = self.snapshot(commit) / file.path, self.blob(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_file():
            return
        place.unlink(missing_ok=True)  # a link into the void
        with suppress(FileExistsError):  # of another process
            try:
                place.symlink_to(os.path.relpath(blob, place.parent))
            except (OSError, NotImplementedError) as error:
                if isinstance(error, FileExistsError):
                    raise
                blob.replace(place)

    # ---- removing -------------------------------------------------------------------------------------------------

    def remove(self) -> int:
        """Deletes the repository's folder and locks; bytes that became free."""
        freed = delete_folder(self.folder)
        return freed if self.locks.parent.is_symlink() else freed + delete_folder(self.locks)

    def remove_commit(self, commit: str) -> int:
        """Deletes a snapshot, the branches and tags that are at it, and the blobs that no other snapshot uses."""
        if self.commits() in ([commit], []):
            return self.remove()
        check_removable(self.folder)
        refs = [self.folder / "refs" / name for name, at in self.revisions().items() if at == commit]
        refs += [mark for mark in _walk(self.folder / MARKS) if mark.name == commit]
        record = self.folder / ".torchchat" / f"{commit}.json"
        blobs = self._blobs_of(_walk(self.snapshot(commit)))
        freed = delete_folder(self.snapshot(commit)) + sum(self._delete(path) for path in [*refs, record])
        return freed + self._delete_unused(blobs)

    def remove_files(self, commit: str, paths: Iterable[str], digests: Iterable[str]) -> int:
        """Deletes files of a snapshot, the blobs that nothing else uses, and what was begun of these digests."""
        check_removable(self.folder)
        places = [self.snapshot(commit) / path for path in paths]
        blobs = self._blobs_of(places)
        begun = [self.folder / "blobs" / f"{digest}.incomplete" for digest in digests]
        return sum(self._delete(place) for place in [*places, *begun]) + self._delete_unused(blobs)

    def places(self, commit: str) -> list[Path]:
        """All files and links of a snapshot."""
        return list(_walk(self.snapshot(commit)))

    def bytes_freed_by(self, places: Iterable[Path], begun: Iterable[str]) -> int:
        """What becomes free where these files of snapshots are deleted, and what was begun of these digests."""
        doomed = set(places)
        others = [place for commit in self.commits() for place in self.places(commit) if place not in doomed]
        blobs = [self.folder / "blobs" / name for name in self._blobs_of(doomed) - self._blobs_of(others)]
        return sum(map(_size, [*doomed, *blobs, *(self.folder / "blobs" / f"{digest}.incomplete" for digest in begun)]))

    def _blobs_of(self, places: Iterable[Path]) -> set[str]:
        """Names of the blobs that links point to, where they point to a blob of this folder."""
        names = set()
        for place in places:
            with suppress(OSError):
                target = Path(os.path.normpath(place.parent / place.readlink()))
                if target.parent == Path(os.path.normpath(self.folder / "blobs")) and DIGEST.fullmatch(target.name):
                    names.add(target.name)
        return names

    def _delete_unused(self, blobs: set[str]) -> int:
        used = self._blobs_of(place for commit in self.commits() for place in _walk(self.snapshot(commit)))
        freed = 0
        for name in blobs - used:
            freed += self._delete(self.folder / "blobs" / name)
            if not self.locks.parent.is_symlink() and not self.locks.is_symlink():
                freed += delete_file(self.locks / f"{name}.lock")
        return freed

    def _delete(self, path: Path) -> int:
        """Raises `TorchchatError` where a folder on the way to the file is a link that leads out."""
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise TorchchatError(f"{quoted_path(str(path.parent))} is a link to "
                                 f"{quoted_path(str(path.parent.resolve()))}, from which "
                                 "torchchat deletes nothing", "delete it yourself")
        return delete_file(path)


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing:
        write_whole(path, content)


def is_listed_well(file: RemoteFile) -> bool:
    """Whether a listed file can be kept: names and sizes are a stranger's."""
    return is_safe_path(file.path) and DIGEST.fullmatch(file.digest) is not None and \
        0 <= file.size <= LARGEST_FILE


def cached_repositories() -> list[CachedRepository]:
    """Every repository of models in the cache, by name."""
    hub = hub_folder()
    names = [name.removeprefix("models--").replace("--", "/") for name in _names(str(hub))
             if name.startswith("models--")]
    return [CachedRepository(name, hub) for name in sorted(names) if NAME.fullmatch(name)]


def reference_text(repository: str, revision: str | None, file: str | None = None) -> str:
    """What a user types to get this again."""
    return HubReference(repository, None if revision == DEFAULT_REVISION else revision, file).text


# Texts rather than paths where all repositories are looked at: with some hundreds of them, that is half of the time.


def _names(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def _entries(folder: str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files and links below a folder, by their path in it; folders that are links are not entered."""
    if len(prefix) >= LONGEST_PATH:
        return
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry


def _walk(folder: Path) -> Iterator[Path]:
    """Files and links below a folder; folders that are links are not entered."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


# ---- deleting -----------------------------------------------------------------------------------------------------


def check_removable(folder: Path) -> None:
    """Raises `TorchchatError` where `folder` or the one above it leads elsewhere: that is not ours to delete."""
    if folder.is_symlink() or (folder.exists() and folder.resolve().parent != folder.parent.resolve()):
        raise TorchchatError(f"{quoted_path(str(folder))} is a link to {quoted_path(str(folder.resolve()))}, which "
                             "torchchat does not delete",
                             "delete it yourself")


def delete_folder(folder: Path) -> int:
    """Deletes a folder with all that is in it, without following links; bytes that became free."""
    check_removable(folder)
    freed = 0
    for parent, folders, names in os.walk(folder, topdown=False):
        freed += sum(delete_file(Path(parent) / name) for name in names)
        for name in folders:
            inner = Path(parent) / name
            freed += delete_file(inner) if inner.is_symlink() else _delete_empty(inner)
    return freed + _delete_empty(folder)


def delete_file(path: Path) -> int:
    try:
        status = path.lstat()
        path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise TorchchatError(f"cannot delete {quoted_path(str(path))}: {error.strerror or error}") from None
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


def size_of_folder(folder: Path) -> int:
    """Bytes that its files have; links count nothing."""
    return sum(map(_size, _walk(folder)))


def _size(path: Path) -> int:
    with suppress(OSError):
        status = path.lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0


def _delete_empty(folder: Path) -> int:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise TorchchatError(f"cannot delete {quoted_path(str(folder))}: {error.strerror or error}") from None
    return 0
