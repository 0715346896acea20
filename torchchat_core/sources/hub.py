"""Models of a Hugging Face hub, kept in the cache that other tools use too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.models.catalogue import load_catalogue
from torchchat_core.sources import assembled
from torchchat_core.sources.hub_cache import (
    DIGEST,
    CachedRepository,
    cached_repositories,
    is_offline,
    reference_text,
)
from torchchat_core.sources.hub_reference import DEFAULT_REVISION, HubReference, parse_hub_location
from torchchat_core.sources.hub_selection import (
    NO_WEIGHTS,
    Selection,
    select,
    shards_beside,
    shards_of_index,
    single_models,
)
from torchchat_core.sources.local import (
    SINGLE_FILE_FORMATS,
    TOKENIZER_PATTERNS,
    files_of_single_file,
    files_with_companions,
)
from torchchat_core.specs import CatalogueEntry, KeptModel, ModelFiles, ModelRef


class HubSource:
    """Implements `specs.KeepingSource`. A model that is here is found without the network, and is not asked for anew:
    to have a branch's later state, remove the model or name the commit."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        reference = _parsed(ref)
        found = self.locate(ref)
        if found is not None:
            return found
        if is_offline():
            raise TorchchatError(f"{reference.text} is not wholly on this machine, and HF_HUB_OFFLINE forbids to fetch "
                                 "it", "unset HF_HUB_OFFLINE, or name a folder that holds the model")
        entry = _entry(reference)
        if entry is not None:
            assembled.assemble(entry, reference, ref.token)
        else:
            from torchchat_core.sources.hub_fetching import fetch_model

            fetch_model(reference, ref.token, tuple(_known_repositories()))
        found = self.locate(ref)
        if found is None:
            raise TorchchatError(f"{reference.text} was fetched, but is not wholly in the cache",
                                 "another program may have removed it at the same time; run the same command again")
        return found

    def locate(self, ref: ModelRef) -> ModelFiles | None:
        reference = _parsed(ref)
        entry = _entry(reference)
        if entry is not None:
            return assembled.files_of_entry(ref, entry, reference)
        repository = CachedRepository(reference.repository)
        commit = repository.commit(reference.revision)
        found = _find(repository, commit, reference) if commit is not None else None
        return found.model_files(ref) if found is not None else None

    def kept(self) -> Iterable[KeptModel]:
        models = {model.reference: model for model in assembled.kept_entries(_entries())}
        for repository in cached_repositories():
            for model in _kept_of(repository):
                models.setdefault(model.reference, model)
        return [models[reference] for reference in sorted(models)]

    def remove(self, ref: ModelRef) -> int:
        """Without revision and file, everything of the repository, as many revisions as are here."""
        reference = _parsed(ref)
        entry = _entry(reference)
        if entry is None:
            return _remove(reference)
        freed = assembled.remove_entry(entry, _entries())
        inner = [name for name in entry.files if not assembled.is_url(name)]
        return freed + sum(_remove(replace(reference, file=name)) for name in inner)


def _parsed(ref: ModelRef) -> HubReference:
    if ref.scheme != "hf":
        raise TorchchatError(f"{ref.text!r} is no model of a hub", "name it as hf:owner/name")
    return parse_hub_location(ref.location)


def _entries() -> list[CatalogueEntry]:
    """The models that consist of more than what their repository says, or of less."""
    return [entry for entry in load_catalogue() if entry.files and entry.reference.startswith("hf:")]


def _entry(reference: HubReference) -> CatalogueEntry | None:
    return next((entry for entry in _entries() if entry.reference == reference.text), None)


def _known_repositories() -> Iterator[str]:
    for entry in load_catalogue():
        with suppress(TorchchatError):
            yield parse_hub_location(entry.reference.removeprefix("hf:")).repository


# ---- models in the cache ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A model all of which is in a snapshot."""

    repository: CachedRepository
    commit: str
    selection: Selection
    paths: tuple[str, ...]  # of all of its files, in the repository
    bytes: int

    def model_files(self, ref: ModelRef) -> ModelFiles:
        snapshot = self.repository.snapshot(self.commit)
        return replace(_opened(ref, [snapshot / path for path in self.selection.weights]), revision=self.commit,
                       digests=self._digests())

    def _digests(self) -> Mapping[str, str]:
        listing, snapshot = self.repository.listing(self.commit), self.repository.snapshot(self.commit)
        digests = {path: listing.files[path].digest for path in self.paths} if listing is not None else {
            path: (snapshot / path).readlink().name for path in self.paths if (snapshot / path).is_symlink()}
        return {path.rpartition("/")[2]: digest for path, digest in digests.items() if DIGEST.fullmatch(digest)}


def _opened(ref: ModelRef, weights: Sequence[Path]) -> ModelFiles:
    first = weights[0]
    is_index = first.name.endswith(".index.json")
    if is_index or (len(weights) > 1 and first.suffix in SINGLE_FILE_FORMATS):
        kind = "safetensors" if ".safetensors" in first.name else "pytorch"
        return files_with_companions(ref, first.parent, kind, tuple(weights))
    return files_of_single_file(ref, first)


def _find(repository: CachedRepository, commit: str, reference: HubReference) -> _Found | None:
    """The model in the snapshot of `commit`, or None where something of it is missing.

    Where torchchat fetched it, a record says what the repository holds. Where another tool did, the model has to be
    whole by its structure, and one of several single files is meant by its name alone.
    """
    here = repository.local_sizes(commit)
    listing = repository.listing(commit)
    try:
        selection = select(listing.sizes if listing is not None else here, reference)
        weights = selection.weights
        if selection.index is not None:
            weights = shards_of_index(repository.snapshot(commit) / selection.index, selection.folder)
    except TorchchatError:
        return None
    paths = tuple(dict.fromkeys((*selection.companions, *selection.weights, *weights)))
    if not all(path in here for path in paths):
        return None
    if listing is not None:
        whole = all(path in listing.files and here[path] == listing.files[path].size for path in paths)
    else:
        whole = _is_whole(selection, weights, reference)
    return _Found(repository, commit, selection, paths, sum(here[path] for path in paths)) if whole else None


def _is_whole(selection: Selection, weights: Sequence[str], reference: HubReference) -> bool:
    """Whether what another tool fetched looks like all of a model."""
    if selection.is_whole or single_models(weights):
        return reference.file is not None
    if any(part not in weights for path in weights for part in shards_beside(path)):
        return False
    names = {path.rpartition("/")[2] for path in selection.companions}
    return bool(names & {"config.json", "params.json"}) and any(
        fnmatchcase(name, pattern) for name in names for pattern in TOKENIZER_PATTERNS)


def _kept_of(repository: CachedRepository) -> Iterator[KeptModel]:
    revisions = repository.revisions()
    for commit in repository.commits():
        names = [name for name, at in revisions.items() if at == commit]
        revision = DEFAULT_REVISION if DEFAULT_REVISION in names else min(names, default=commit)
        whole = _find(repository, commit, HubReference(repository.name, revision))
        if whole is not None:
            yield KeptModel(reference=reference_text(repository.name, revision), bytes=whole.bytes,
                            path=repository.snapshot(commit))
        for group in single_models(repository.local_sizes(commit)):
            found = _find(repository, commit, HubReference(repository.name, revision, group[0]))
            if found is not None and (whole is None or group[0] not in whole.paths):
                yield KeptModel(reference=reference_text(repository.name, revision, group[0]), bytes=found.bytes,
                                path=repository.snapshot(commit) / group[0])


# ---- removing -----------------------------------------------------------------------------------------------------


def _remove(reference: HubReference) -> int:
    repository = CachedRepository(reference.repository)
    if reference.revision is None and reference.file is None:
        return repository.remove()
    commit = repository.commit(reference.revision)
    if commit is None or commit not in repository.commits():
        return 0
    return repository.remove_commit(commit) if reference.file is None else _remove_file(repository, commit, reference)


def _remove_file(repository: CachedRepository, commit: str, reference: HubReference) -> int:
    """The weights that are named; where no others are in the snapshot, what went with them too."""
    here, listing = repository.local_sizes(commit), repository.listing(commit)
    try:
        weights = select(listing.sizes if listing is not None else here, reference).weights
    except TorchchatError:
        return 0
    others = [path for path in here if path not in weights and path.rpartition(".")[2].lower() not in NO_WEIGHTS]
    if not others:
        return repository.remove_commit(commit)
    digests = [listing.files[path].digest for path in weights] if listing is not None else []
    return repository.remove_files(commit, weights, digests)
