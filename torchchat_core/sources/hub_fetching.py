"""Fetching files from a Hugging Face hub into the cache of Hugging Face's tools."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torchchat_core import __version__, progress
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.sources.downloading import (
    TIMEOUT,
    Cancelled,
    ConnectionFailure,
    Download,
    HTTPFailure,
    check_free_space,
    digest_of,
    download,
    length,
    locked,
    trying_again,
    writing,
)
from torchchat_core.sources.hub_cache import COMMIT, CachedRepository, Listing, RemoteFile, hub_folder, is_listed_well
from torchchat_core.sources.hub_errors import GIVE_TOKEN, explained
from torchchat_core.sources.hub_reference import DEFAULT_REVISION, HubReference, check_endpoint, hub_endpoint
from torchchat_core.sources.hub_selection import Selection, select, shards_of_index

HTTP_LIBRARIES = {"httpx2", "httpx", "httpcore2", "httpcore", "requests", "urllib3"}
CONNECTIONS = 4  # files fetched at once
PLAIN_HTTP_LIMIT = 50_000_000_000  # bytes; the public hub serves larger files over its Xet protocol alone


def fetch_model(reference: HubReference, token: str | None, known: tuple[str, ...] = ()) -> str:
    """Fetches what is missing of the model; the commit that it is of.

    `known` are repositories, for near matches of one that does not exist. Raises `TorchchatError` for whatever goes
    wrong; what has come stays, and the next call goes on from there.
    """
    fetch = _Fetch(reference, token, known)
    selection = select(fetch.listing.sizes, reference)
    fetch.check_digest()
    weights = fetch.shards(selection)
    fetch.run(selection.companions, weights)
    return fetch.finish()


def fetch_files(reference: HubReference, paths: Sequence[str], token: str | None) -> str:
    """Fetches these files of the repository; the commit that they are of. Raises `TorchchatError` as above."""
    fetch = _Fetch(reference, token, ())
    missing = next((path for path in paths if path not in fetch.listing.files), None)
    if missing is not None:
        raise TorchchatError(f"there is no file {quoted(missing)} in {reference.repository} any more",
                             "a later version of torchchat may know what took its place")
    fetch.run((), paths)
    return fetch.finish()


class _Fetch:
    """One run: asks for the list of files, then fetches some of them."""

    def __init__(self, reference: HubReference, token: str | None, known: tuple[str, ...]) -> None:
        check_endpoint()
        self._reference = reference
        self._token = token
        self._known = known
        self._headers = _headers(token)
        self._cancelled = threading.Event()
        self._repository = CachedRepository(reference.repository)
        try:
            self.listing = trying_again(self._list)
        except (HTTPFailure, ConnectionFailure) as failure:
            raise self._explained(failure) from None

    def shards(self, selection: Selection) -> tuple[str, ...]:
        """The weights; where an index names them, it is fetched first."""
        if selection.index is None:
            return selection.weights
        self.run((), selection.weights)
        index = self._repository.snapshot(self.listing.commit) / selection.index
        shards = shards_of_index(index, selection.folder)
        missing = next((shard for shard in shards if shard not in self.listing.files), None)
        if missing is not None:
            raise TorchchatError(f"{selection.index} names {quoted(missing)}, which {self._reference.repository} does "
                                 "not "
                                 "hold", "its owner has not uploaded all of the model; choose another one")
        return shards

    def check_digest(self) -> None:
        """Raises `TorchchatError` where the hub's file is another one than is asked for by its sha256."""
        asked, file = self._reference.sha256, self._reference.file
        if asked is None or file is None:
            return
        listed = self.listing.files[file].digest
        if len(listed) == len(asked) and listed != asked:  # of a small file the hub lists another kind of digest
            raise TorchchatError(f"{file} of {self._reference.repository} is another file: its sha256 is {listed}, and "
                                 f"{asked} was asked for", "check the digest, or name the commit that it is of")

    def run(self, companions: Sequence[str], weights: Sequence[str]) -> None:
        """Fetches what is missing of these files, the weights last: where they are, everything is."""
        self._record()
        batches = [[file for path in dict.fromkeys(paths) if not self._is_here(file := self.listing.files[path])]
                   for paths in (companions, weights)]
        files = [file for batch in batches for file in batch]
        if not files:
            return
        needed = sum(file.size - min(file.size, length(self._partial(file))) for file in files if not self._has(file))
        check_free_space(hub_folder(), needed, self._reference.repository)
        count = f"{len(files)} files" if len(files) > 1 else "1 file"
        with progress.task(f"{self._reference.repository}: {count}", sum(file.size for file in files), "B") as whole:
            for batch in batches:
                self._in_parallel(batch, whole)

    def _record(self) -> None:
        """Before anything is fetched, so that what an interrupted run left can be found and removed."""
        with writing(self._repository.folder):
            self._repository.snapshot(self.listing.commit).mkdir(parents=True, exist_ok=True)
            self._repository.write_listing(self.listing)
            self._repository.mark_revision(self._reference.revision, self.listing.commit)

    def finish(self) -> str:
        """Keeps what the branch is at, now that the model is here; the commit."""
        with writing(self._repository.folder):
            self._repository.write_revision(self._reference.revision, self.listing.commit)
        return self.listing.commit

    # ---- the list of files ----------------------------------------------------------------------------------------

    def _list(self) -> Listing:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=hub_endpoint(), token=self._token, library_name="torchchat", library_version=__version__)
        info = _asking(lambda: api.model_info(self._reference.repository, files_metadata=True, timeout=TIMEOUT,
                                              revision=self._reference.revision or DEFAULT_REVISION))
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise TorchchatError(f"{hub_endpoint()} names {quoted(commit)} as the commit of "
                                 f"{self._reference.repository}",
                                 "check HF_ENDPOINT")
        found = [_remote_file(sibling) for sibling in info.siblings or ()]
        files = [file for file in found if file is not None and is_listed_well(file)]
        return Listing(commit, {file.path: file for file in files})

    def _explained(self, failure: HTTPFailure | ConnectionFailure, file: str | None = None) -> TorchchatError:
        return explained(failure, self._reference, file=file, has_token="authorization" in self._headers,
                         known=self._known)

    # ---- files ----------------------------------------------------------------------------------------------------

    def _is_here(self, file: RemoteFile) -> bool:
        place = self._repository.snapshot(self.listing.commit) / file.path
        return place.is_file() and place.stat().st_size == file.size

    def _has(self, file: RemoteFile) -> bool:
        """Whether another snapshot of the repository brought the same content."""
        blob = self._repository.blob(file)
        return blob.is_file() and blob.stat().st_size == file.size

    def _partial(self, file: RemoteFile) -> Path:
        blob = self._repository.blob(file)
        return blob.with_name(f"{blob.name}.incomplete")  # the name that huggingface_hub before 1.0 went on with

    def _in_parallel(self, files: Sequence[RemoteFile], whole: progress.Task) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            futures = [pool.submit(contextvars.copy_context().run, self._fetch, file, whole) for file in files]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # also the user's interruption: all stop, and keep what they have
                self._cancelled.set()
                for future in futures:
                    future.cancel()
                raise

    def _fetch(self, file: RemoteFile, whole: progress.Task) -> None:
        repository, blob, place = self._repository, self._repository.blob(file), self._partial(file)
        with writing(blob):
            blob.parent.mkdir(parents=True, exist_ok=True)
        with progress.task(file.path, file.size, "B") as task:
            def advance(count: int) -> None:
                task.advance(count)
                whole.advance(count)

            if file.size > PLAIN_HTTP_LIMIT:
                self._fetch_by_library(file, advance)
                return
            with locked(repository.lock(file), self._cancelled):
                if self._has(file):
                    advance(file.size)
                else:
                    self._download(file, place, advance)
                    self._check(file, place)
                    with writing(blob):
                        place.replace(blob)
                with writing(blob):
                    repository.link(file, self.listing.commit)

    def _download(self, file: RemoteFile, place: Path, advance: Callable[[int], None]) -> None:
        url = f"{hub_endpoint()}/{self._reference.repository}/resolve/{self.listing.commit}/{quote(file.path)}"
        try:
            download(Download(url, place, file.path, file.size, self._headers), advance, self._cancelled)
        except (HTTPFailure, ConnectionFailure) as failure:
            raise self._explained(failure, file.path) from None
        if file.size == 0:
            place.touch()

    def _check(self, file: RemoteFile, place: Path) -> None:
        """Deletes what is not the file that the hub listed."""
        size = length(place)
        if size != file.size:
            place.unlink(missing_ok=True)
            raise TorchchatError(f"{file.path} of {self._reference.repository} has {size} bytes, and the hub lists "
                                 f"{file.size}", "it was deleted; its owner has to upload it again")
        kind = "sha256" if len(file.digest) == 64 else "git"
        found = digest_of(place, kind, self._cancelled)
        if found != file.digest:
            place.unlink(missing_ok=True)
            name = "sha256" if kind == "sha256" else "git sha1"
            raise TorchchatError(f"{file.path} of {self._reference.repository} came damaged: its {name} is {found}, "
                                 f"and the hub lists {file.digest}", "it was deleted; run the same command again")

    def _fetch_by_library(self, file: RemoteFile, advance: Callable[[int], None]) -> None:
        """With what huggingface_hub has for the largest files. It does not go on with what another run fetched."""
        from huggingface_hub import hf_hub_download

        bar = _bar(advance, self._cancelled)
        told = "tqdm_class" in inspect.signature(hf_hub_download).parameters  # 1.0 has none
        options: dict[str, Any] = {"tqdm_class": bar} if told else {}
        try:
            found = _asking(lambda: hf_hub_download(
                self._reference.repository, file.path, revision=self.listing.commit, cache_dir=hub_folder(),
                endpoint=hub_endpoint(), token=self._token, **options))
        except (HTTPFailure, ConnectionFailure) as failure:
            raise self._explained(failure, file.path) from None
        advance(file.size - bar.advanced)
        try:
            self._check(file, Path(found).resolve())
        except TorchchatError:
            Path(found).unlink(missing_ok=True)
            raise


def _headers(token: str | None) -> dict[str, str]:
    """With the token, else that of the environment or of a login. Raises `TorchchatError` where it can be none."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if token is not None:
        _check_token(token)
    try:
        headers: dict[str, str] = build_hf_headers(token=token, library_name="torchchat", library_version=__version__)
    except OSError as error:
        raise TorchchatError(f"the token of `hf auth login` cannot be read: {error.filename}: "
                             f"{error.strerror or error}", "check HF_HOME and HF_TOKEN_PATH, or give a token by "
                             "--hf-token") from None
    if "authorization" in headers:
        _check_token(headers["authorization"].removeprefix("Bearer "))
    return headers


def _check_token(token: str) -> None:
    if not token.isascii() or not token.isprintable() or not token or " " in token:  # the token itself is not shown
        raise TorchchatError(f"the token {'holds characters that no token has' if token else 'is empty'}",
                             f"make one at {hub_endpoint()}/settings/tokens and give it by {GIVE_TOKEN}")


def _asking(request: Callable[[], Any]) -> Any:
    """What huggingface_hub answers. Raises `HTTPFailure` or `ConnectionFailure` in place of its HTTP library's errors,
    and `TorchchatError` for an answer that it does not understand."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return request()
    except (Cancelled, TorchchatError):
        raise
    except HfHubHTTPError as error:
        if error.response is None:
            raise ConnectionFailure(str(error)) from None
        raise HTTPFailure(error.response.status_code, dict(error.response.headers), "") from None
    except Exception as error:
        reason = "".join(char for char in str(error).partition("\n")[0][:300] if char.isprintable())
        if _is_of_connection(error):
            raise ConnectionFailure(reason or type(error).__name__) from None
        raise TorchchatError(f"{hub_endpoint()} answers what is no answer of a hub ({type(error).__name__}: {reason})",
                             "check HF_ENDPOINT, and whether a proxy changes what comes") from None


def _is_of_connection(error: Exception) -> bool:
    """Whether it is one of the HTTP library, which is another one in every major version of huggingface_hub, and not
    of what an answer holds."""
    if isinstance(error, ValueError):  # JSON's
        return False
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & HTTP_LIBRARIES)


def _remote_file(sibling: Any) -> RemoteFile | None:
    """None for a file without a size or a digest, or with one that is none."""
    try:
        digest = sibling.lfs["sha256"] if sibling.lfs else sibling.blob_id
        size = sibling.lfs["size"] if sibling.lfs and sibling.lfs.get("size") is not None else sibling.size
        return RemoteFile(str(sibling.rfilename), int(size), str(digest))
    except (ValueError, TypeError, OverflowError, LookupError, AttributeError):
        return None


def _bar(advance: Callable[[int], None], cancelled: threading.Event) -> Any:
    """A class of progress bars that show nothing, but tell of bytes."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        advanced = 0  # bytes, of all such bars

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)  # of huggingface_hub's own bars
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if cancelled.is_set():
                raise Cancelled
            Bar.advanced += int(n or 0)
            advance(int(n or 0))
            return None

    return Bar
