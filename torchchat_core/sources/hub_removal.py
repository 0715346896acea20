"""What of a hub's repository is deleted together, and deleting it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.sources.hub_cache import CachedRepository, size_of_folder
from torchchat_core.sources.hub_models import Found, Snapshot, found_in
from torchchat_core.sources.hub_reference import DEFAULT_REVISION, HubReference
from torchchat_core.sources.hub_selection import NO_WEIGHTS, select
from torchchat_core.specs import KeptModel, Removal


@dataclass(frozen=True)
class _Part:
    """What of one snapshot goes."""

    commit: str
    weights: tuple[str, ...] = ()  # paths in the repository; none: all of the snapshot
    digests: tuple[str, ...] = ()  # of the weights, which a download may have begun

    def takes(self, model: Found) -> bool:
        return model.commit == self.commit and (not self.weights or not set(self.weights).isdisjoint(model.paths))


def removal(reference: HubReference) -> Removal | None:
    """What `remove` would delete; None where there is nothing."""
    repository = CachedRepository(reference.repository)
    parts = _parts(repository, reference)
    if _is_all(repository, parts):
        if not repository.folder.is_dir() or _is_of_nothing(reference, parts):
            return None
        return Removal(path=repository.folder, bytes=size_of_folder(repository.folder), models=kept_in(repository))
    places = [place for part in parts for place in _places(repository, part)]
    if not places:
        return None
    begun = [digest for part in parts for digest in part.digests]
    snapshot = repository.snapshot(parts[0].commit)
    models = tuple(_kept(text, found) for text, found in sorted(found_in(repository), key=itemgetter(0))
                   if any(part.takes(found) for part in parts))
    freed = repository.bytes_freed_by(places, begun)
    path = snapshot / parts[0].weights[0] if parts[0].weights else snapshot
    return Removal(path=path, bytes=freed, models=models) if models or freed else None


def remove(reference: HubReference) -> int:
    """Deletes it; bytes that became free.

    Without revision and file, everything of the repository, as many revisions as are here. A file is the weights that
    it names; where no others are in the snapshot, what went with them too.
    """
    repository = CachedRepository(reference.repository)
    parts = _parts(repository, reference)
    if _is_all(repository, parts):
        return 0 if _is_of_nothing(reference, parts) else repository.remove()
    return sum(repository.remove_files(part.commit, part.weights, part.digests) if part.weights
               else repository.remove_commit(part.commit) for part in parts)


def kept_in(repository: CachedRepository) -> tuple[KeptModel, ...]:
    """Every model that is whole in the repository."""
    return tuple(_kept(text, found) for text, found in sorted(found_in(repository), key=itemgetter(0)))


def _kept(text: str, found: Found) -> KeptModel:
    return KeptModel(reference=text, path=found.path, bytes=found.bytes)


def _parts(repository: CachedRepository, reference: HubReference) -> list[_Part]:
    here = repository.commits()
    if reference.revision is None and reference.file is None:
        return [_Part(commit) for commit in here]
    others = {at for name, at in repository.revisions().items() if name != (reference.revision or DEFAULT_REVISION)}
    meant = repository.commits_at(reference.revision)
    commits = [commit for commit in meant if commit in here and (commit == meant[0] or commit not in others)]
    parts = [_Part(commit) if reference.file is None else _part_of_file(repository, commit, reference)
             for commit in commits]
    return [part for part in parts if part is not None]


def _part_of_file(repository: CachedRepository, commit: str, reference: HubReference) -> _Part | None:
    state = Snapshot.of(repository, commit)
    try:
        weights = select(state.sizes, reference).weights
    except TorchchatError:
        return None
    others = [path for path in state.here if path not in weights
              and path.rpartition(".")[2].lower() not in NO_WEIGHTS]
    if not others:
        return _Part(commit)
    listed = state.listing.files if state.listing is not None else {}
    return _Part(commit, weights, tuple(listed[path].digest for path in weights if path in listed))


def _is_all(repository: CachedRepository, parts: list[_Part]) -> bool:
    return {part.commit for part in parts if not part.weights} == set(repository.commits())


def _is_of_nothing(reference: HubReference, parts: list[_Part]) -> bool:
    """Whether what was named is not here, in a repository without snapshots."""
    return not parts and (reference.revision is not None or reference.file is not None)


def _places(repository: CachedRepository, part: _Part) -> list[Path]:
    snapshot = repository.snapshot(part.commit)
    return [snapshot / path for path in part.weights] if part.weights else repository.places(part.commit)
