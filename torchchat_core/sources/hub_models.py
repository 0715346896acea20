"""Models of a hub that are in the cache, and whether all of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.sources.hub_cache import DIGEST, CachedRepository, Listing, reference_text
from torchchat_core.sources.hub_reference import DEFAULT_REVISION, HubReference
from torchchat_core.sources.hub_selection import Selection, select, shards_beside, shards_of_index, single_models
from torchchat_core.sources.local import (
    SINGLE_FILE_FORMATS,
    TOKENIZER_PATTERNS,
    files_of_single_file,
    files_with_companions,
)
from torchchat_core.specs import ModelFiles, ModelRef


@dataclass(frozen=True)
class Found:
    """A model all of which is in a snapshot."""

    repository: CachedRepository
    commit: str
    selection: Selection
    paths: tuple[str, ...]  # of all of its files, in the repository
    bytes: int
    is_named: bool  # by its file, rather than being what the repository is

    @property
    def path(self) -> Path:
        """The folder, or the file where the model is one by itself."""
        snapshot = self.repository.snapshot(self.commit)
        return snapshot / self.selection.weights[0] if self.is_named else snapshot

    def has_digest(self, file: str, sha256: str) -> bool:
        """Whether the content of one of its files is the one that is asked for."""
        from torchchat_core.sources.downloading import digest_of

        known = self._digests().get(file.rpartition("/")[2], "")
        return sha256 == (known if len(known) == len(sha256) else digest_of(
            self.repository.snapshot(self.commit) / file, "sha256"))

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


@dataclass(frozen=True)
class Snapshot:
    """What of a commit is here, and what there is to be."""

    repository: CachedRepository
    commit: str
    here: Mapping[str, int]  # path in the repository -> bytes
    listing: Listing | None

    @classmethod
    def of(cls, repository: CachedRepository, commit: str) -> Snapshot:
        return cls(repository, commit, repository.local_sizes(commit), repository.listing(commit))

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.here if self.listing is None else self.listing.sizes


def find(state: Snapshot, reference: HubReference) -> Found | None:
    """The model in a snapshot, or None where something of it is missing.

    Where torchchat fetched it, a record says what the repository holds. Where another tool did, the model has to be
    whole by its structure, and one of several single files is meant by its name alone.
    """
    repository, commit, here, listing = state.repository, state.commit, state.here, state.listing
    try:
        selection = select(state.sizes, reference)
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
    return Found(repository, commit, selection, paths, sum(here[path] for path in paths),
                 reference.file is not None) if whole else None


def _is_whole(selection: Selection, weights: Sequence[str], reference: HubReference) -> bool:
    """Whether what another tool fetched looks like all of a model."""
    if selection.is_whole or single_models(weights):
        return reference.file is not None
    if any(part not in weights for path in weights for part in shards_beside(path)):
        return False
    names = {path.rpartition("/")[2] for path in selection.companions}
    return bool(names & {"config.json", "params.json"}) and any(
        fnmatchcase(name, pattern) for name in names for pattern in TOKENIZER_PATTERNS)


def found_in(repository: CachedRepository) -> list[tuple[str, Found]]:
    """Every model that is whole in the repository, with the reference that a user types for it.

    A state of a branch that the branch has left is the branch's still for what later states do not have here;
    everything else of it is named by its commit.
    """
    revisions = repository.revisions()
    states = {name: repository.commits_at(name) for name in _main_first({*revisions, DEFAULT_REVISION})}
    places = {commit: index for commits in states.values() for index, commit in enumerate(commits)}
    found: dict[str, Found] = {}
    for commit in sorted(repository.commits(), key=lambda commit: places.get(commit, len(places))):
        names = [name for name, commits in states.items() if commit in commits]
        for file, model in _models_of(repository, commit):
            texts = [reference_text(repository.name, name, file) for name in names]
            free = (text for text in texts if text not in found)
            found[next(free, reference_text(repository.name, commit, file))] = model
    return list(found.items())


def _main_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name != DEFAULT_REVISION, name))


def _models_of(repository: CachedRepository, commit: str) -> Iterator[tuple[str | None, Found]]:
    """The model that a snapshot is, with None, and the single files in it that are models, with their names."""
    state = Snapshot.of(repository, commit)
    whole = find(state, HubReference(repository.name, commit))
    if whole is not None:
        yield None, whole
    for group in single_models(state.here):
        if whole is None or group[0] not in whole.paths:
            found = find(state, HubReference(repository.name, commit, group[0]))
            if found is not None:
                yield group[0], found
