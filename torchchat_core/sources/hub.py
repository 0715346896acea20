"""Models of a Hugging Face hub, kept in the cache that other tools use too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.catalogue import load_catalogue
from torchchat_core.sources import assembled, hub_removal
from torchchat_core.sources.hub_cache import CachedRepository, cached_repositories, is_offline
from torchchat_core.sources.hub_models import Found, Snapshot, find
from torchchat_core.sources.hub_reference import HubReference, parse_hub_location
from torchchat_core.specs import CatalogueEntry, KeptModel, ModelFiles, ModelRef, Removal


class HubSource:
    """Implements `specs.KeepingSource`. A model that is here is found without the network, and is not asked for anew:
    to have a branch's later state, remove the model or name the commit."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        reference = _parsed(ref)
        found = self.locate(ref)
        if found is not None:
            return found
        entry = _entry(reference)
        if entry is not None:
            assembled.link_found(entry, reference)
            if (found := self.locate(ref)) is not None:
                return found
        if is_offline():
            missing = f" (missing: {', '.join(assembled.missing_files(entry))})" if entry is not None else ""
            place = assembled.how_to_place(entry) if entry is not None else "name a folder that holds the model"
            raise TorchchatError(f"{reference.text} is not completely on this machine{missing}, and HF_HUB_OFFLINE "
                                 "forbids downloading it", f"unset HF_HUB_OFFLINE, or {place}")
        if entry is not None:
            assembled.assemble(entry, reference, ref.token)
        else:
            from torchchat_core.sources.hub_fetching import fetch_model

            fetch_model(reference, ref.token, tuple(_known_repositories()))
        found = self.locate(ref)
        if found is None and reference.sha256:
            raise TorchchatError(f"{reference.file} of {reference.repository} is another file than the one with the "
                                 f"sha256 {reference.sha256}", "check the digest, or name the commit that it is of")
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
        for commit in repository.commits_at(reference.revision):
            found = find(Snapshot.of(repository, commit), reference)
            if found is not None and _is_asked_for(found, reference):
                return found.model_files(ref)
        return None

    def kept(self) -> Iterable[KeptModel]:
        models = {model.reference: model for model in assembled.kept_entries(_entries())}
        for repository in cached_repositories():
            for model in hub_removal.kept_in(repository):
                models.setdefault(model.reference, model)
        return [models[reference] for reference in sorted(models)]

    def removal(self, ref: ModelRef) -> Removal | None:
        """What `remove` deletes; of a model that consists of files of several places, what is here of them."""
        reference = _parsed(ref)
        entry = _entry(reference)
        if entry is None:
            return hub_removal.removal(reference)
        inner = [hub_removal.removal(replace(reference, file=name)) for name in entry.files
                 if not assembled.is_url(name)]
        return assembled.removal_of_entry(entry) or next((found for found in inner if found is not None), None)

    def remove(self, ref: ModelRef) -> int:
        """Without revision and file, everything of the repository, as many revisions as are here."""
        reference = _parsed(ref)
        entry = _entry(reference)
        if entry is None:
            return hub_removal.remove(reference)
        freed = assembled.remove_entry(entry, _entries())
        inner = [name for name in entry.files if not assembled.is_url(name)]
        return freed + sum(hub_removal.remove(replace(reference, file=name)) for name in inner)


def _is_asked_for(found: Found, reference: HubReference) -> bool:
    return reference.sha256 is None or reference.file is None or found.has_digest(reference.file, reference.sha256)


def _parsed(ref: ModelRef) -> HubReference:
    if ref.scheme != "hf":
        raise TorchchatError(f"{quoted(ref.text)} is no model of a hub", "name it as hf:owner/name")
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
