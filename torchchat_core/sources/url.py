"""Models that are a single file on the web, kept in torchchat's own cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.small_files import cache_folder
from torchchat_core.sources.hub_cache import is_offline, size_of_folder
from torchchat_core.sources.local import SHARD, files_of_single_file
from torchchat_core.sources.url_file import KeptFile, UrlFile, read_record
from torchchat_core.specs import KeptModel, ModelFiles, ModelRef, Removal


class UrlSource:
    """Implements `specs.KeepingSource` for addresses such as https://host/path/file.gguf#sha256=HEX."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        kept = _kept(ref)
        _check_is_one_model(kept.origin)
        if not kept.is_here():
            if is_offline():
                raise TorchchatError(f"{kept.origin.name} is not wholly on this machine, and HF_HUB_OFFLINE forbids to "
                                     "fetch it", "unset HF_HUB_OFFLINE, or name a file of this machine")
            from torchchat_core.sources.url_fetching import fetch_url_file

            fetch_url_file(kept)
        return _files(ref, kept)

    def locate(self, ref: ModelRef) -> ModelFiles | None:
        kept = _kept(ref)
        return _files(ref, kept) if kept.is_here() else None

    def kept(self) -> Iterable[KeptModel]:
        base = _base()
        try:
            folders = sorted(entry.path for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return []
        files = [file for folder in folders if (file := _recorded(Path(folder))) is not None]
        return [KeptModel(reference=file.origin.url, path=file.path, bytes=file.path.stat().st_size) for file in files]

    def removal(self, ref: ModelRef) -> Removal | None:
        kept = _kept(ref)
        if not kept.folder.is_dir() or kept.is_another():
            return None
        if not kept.is_here():
            return Removal(path=kept.folder, bytes=size_of_folder(kept.folder))
        size = kept.path.stat().st_size
        return Removal(path=kept.path, bytes=size, models=(
            KeptModel(reference=kept.origin.url, path=kept.path, bytes=size),))

    def remove(self, ref: ModelRef) -> int:
        kept = _kept(ref)
        return 0 if kept.is_another() else kept.remove()


def _base() -> Path:
    return cache_folder() / "url"


def _kept(ref: ModelRef) -> KeptFile:
    if ref.scheme not in ("https", "http"):
        raise TorchchatError(f"{quoted_path(ref.text)} is no address of a file", "it has to be like https://host/path/file.gguf")
    return KeptFile(UrlFile.parse(f"{ref.scheme}:{ref.location}"), _base())


def _check_is_one_model(file: UrlFile) -> None:
    """Refuses before gigabytes are fetched what could not be opened afterwards."""
    match = SHARD.fullmatch(file.name)
    if match is not None and int(match["count"]) > 1:
        raise TorchchatError(f"{file.name} is one of the {int(match['count'])} files of a model, and an address "
                             "names one alone", "download all of them into one folder and name the first")
    if "." not in file.name:
        raise TorchchatError(f"{quoted_path(file.url)} names a file without an ending, which tells what it holds",
                             "give the address of a file such as model.gguf or model.safetensors")


def _files(ref: ModelRef, kept: KeptFile) -> ModelFiles:
    return replace(files_of_single_file(ref, kept.path), digests={kept.origin.name: str(kept.record()["sha256"])})


def _recorded(folder: Path) -> KeptFile | None:
    """The complete copy in a folder, if it is what its record says."""
    try:
        kept = KeptFile(UrlFile.parse(str(read_record(folder).get("url"))), folder.parent)
    except TorchchatError:
        return None
    return kept if kept.folder == folder and kept.is_here() else None
