"""Models whose files come from several places, put together in a folder of their own.

The catalogue names the files: paths in the model's repository, and URLs of others. The folder holds links to the
copies that the hub's cache and the folder `parts` keep; where the file system has no links, copies.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import cache_folder, make_folder
from torchchat_core.sources.hub_cache import COMMIT, DIGEST, CachedRepository, delete_folder
from torchchat_core.sources.hub_reference import HubReference
from torchchat_core.sources.local import files_of_folder, files_of_single_file
from torchchat_core.sources.url_file import KeptFile, UrlFile
from torchchat_core.specs import CatalogueEntry, KeptModel, ModelFiles, ModelRef, Removal


def is_url(name: str) -> bool:
    """Whether a file of a catalogue entry is one of another place."""
    return "://" in name


def files_of_entry(ref: ModelRef, entry: CatalogueEntry, reference: HubReference) -> ModelFiles | None:
    """The model, where all of its files are here; else None."""
    folder = _folder(entry)
    places = [folder / _name(file) for file in entry.files]
    if not all(place.is_file() for place in places):
        return None
    single = folder / _name(reference.file) if reference.file else None
    found = files_of_folder(ref, folder) if single is None else files_of_single_file(ref, single)
    blobs = {place.name: place.resolve().name for place in places if DIGEST.fullmatch(place.resolve().name)}
    parts = [UrlFile.parse(file) for file in entry.files if is_url(file)]
    digests = blobs | {part.name: part.sha256 for part in parts if part.sha256}
    commits = [part for place in places if place.is_symlink() for part in place.readlink().parts
               if COMMIT.fullmatch(part)]
    return replace(found, revision=commits[0] if commits else None, digests=digests)


def assemble(entry: CatalogueEntry, reference: HubReference, token: str | None) -> None:
    """Fetch the missing files into the model's folder; files that the user put there are kept.

    Raises a `TorchchatError` that names the missing files and their folder if one cannot be fetched.
    """
    link_found(entry, reference)
    missing = missing_files(entry)
    try:
        _assemble(entry, reference, token, [file for file in entry.files if _name(file) in missing])
    except TorchchatError as error:
        raise TorchchatError(f"{error.message}; missing of {entry.alias}: {', '.join(missing)}",
                             f"{error.fix + ', ' if error.fix else ''}or {how_to_place(entry)}") from error


def link_found(entry: CatalogueEntry, reference: HubReference) -> None:
    """Put missing files that are in a cache into the model's folder, without using the network."""
    from torchchat_core.sources.downloading import writing

    repository = CachedRepository(reference.repository)
    snapshots = [repository.snapshot(commit) for commit in repository.commits_at(reference.revision)]
    missing = missing_files(entry)
    found: dict[str, Path] = {}
    for file in entry.files:
        if _name(file) in missing:
            copies = [_part(file).path] if is_url(file) and _part(file).is_here() else \
                [] if is_url(file) else [snapshot / file for snapshot in snapshots]
            copy = next((each for each in copies if each.is_file()), None)
            if copy is not None:
                found[file] = copy
    if found:
        with writing(_folder(entry)):
            make_folder(_folder(entry))
            for file, copy in found.items():
                _put(copy, _folder(entry) / _name(file))


def missing_files(entry: CatalogueEntry) -> list[str]:
    """Return the names of the model's files that are not in its folder."""
    return [_name(file) for file in entry.files if not (_folder(entry) / _name(file)).is_file()]


def how_to_place(entry: CatalogueEntry) -> str:
    """Return the instruction for placing the missing files by hand."""
    return f"put {' and '.join(missing_files(entry))} into {_folder(entry)}"


def _assemble(entry: CatalogueEntry, reference: HubReference, token: str | None, wanted: Sequence[str]) -> None:
    from torchchat_core.sources.downloading import writing
    from torchchat_core.sources.hub_fetching import fetch_files
    from torchchat_core.sources.url_fetching import fetch_url_file

    parts = {file: _part(file) for file in wanted if is_url(file)}
    for part in parts.values():
        if not part.is_here():
            fetch_url_file(part)
    inner = [file for file in wanted if not is_url(file)]
    repository = CachedRepository(reference.repository)
    snapshot = repository.snapshot(fetch_files(reference, inner, token)) if inner else None
    with writing(_folder(entry)):
        make_folder(_folder(entry))
        for file in parts:
            _put(parts[file].path, _folder(entry) / _name(file))
        if snapshot is not None:
            for file in inner:
                _put(snapshot / file, _folder(entry) / _name(file))


def kept_entries(entries: Iterable[CatalogueEntry]) -> Iterator[KeptModel]:
    """Those of the entries all of whose files are here."""
    for entry in entries:
        places = [_folder(entry) / _name(file) for file in entry.files]
        with suppress(OSError):
            if all(place.is_file() for place in places):
                yield KeptModel(reference=entry.reference, path=_folder(entry),
                                bytes=sum(place.stat().st_size for place in places))


def removal_of_entry(entry: CatalogueEntry) -> Removal | None:
    """What goes with the model; None where not all of it is here."""
    return next((Removal(path=kept.path, bytes=kept.bytes, models=(kept,)) for kept in kept_entries([entry])), None)


def remove_entry(entry: CatalogueEntry, entries: Iterable[CatalogueEntry]) -> int:
    """Deletes the folder, and the files of other places that no other assembled model uses; bytes that became free."""
    freed = delete_folder(_folder(entry))
    used = {file for other in entries if other != entry and _folder(other).is_dir() for file in other.files}
    return freed + sum(_part(file).remove() for file in entry.files if is_url(file) and file not in used)


def _folder(entry: CatalogueEntry) -> Path:
    return cache_folder() / "models" / re.sub(r"[^A-Za-z0-9_.-]+", "--", entry.reference.removeprefix("hf:"))


def _part(url: str) -> KeptFile:
    return KeptFile(UrlFile.parse(url), cache_folder() / "parts")


def _name(file: str) -> str:
    return UrlFile.parse(file).name if is_url(file) else file.rpartition("/")[2]


def _put(file: Path, place: Path) -> None:
    """A link to the file, or a copy, which appears once it is complete."""
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(file.absolute())
    except (OSError, NotImplementedError):
        beside = place.with_name(f"{place.name}.incomplete")
        shutil.copyfile(file, beside)
        beside.replace(place)

