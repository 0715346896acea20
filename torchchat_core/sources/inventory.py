"""Which models are known by name, and which of them are on this machine. Never touches the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.plugins import Registry
from torchchat_core.products import Product, products, reference_of
from torchchat_core.sources.local import WHOLE_MODEL_FORMATS, files_of_folder
from torchchat_core.sources.reference import resolve
from torchchat_core.specs import CatalogueEntry, KeptModel, ModelFiles, ModelRef, ModelSourceInfo


@dataclass(frozen=True, kw_only=True)
class ListedModel:
    """A model of the catalogue, or one that is here without being in it."""

    name: str  # its short name, or its reference where it has none
    reference: str
    licence: str = ""
    gated: bool = False
    bytes: int | None = None  # to be downloaded, about
    path: Path | None = None  # of the folder or file, where it is here
    bytes_here: int | None = None  # where a source keeps it
    products: tuple[Product, ...] = ()


@dataclass
class Inventory:
    """What there is, and what was wrong with a source that could not tell."""

    models: list[ListedModel] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def take_inventory(registry: Registry) -> Inventory:
    """The catalogue of every source, then what is here without being in one. A faulty source becomes a warning."""
    inventory = Inventory()
    made = products()
    for info in sorted(registry.infos(ModelSourceInfo), key=lambda info: info.keeps):  # what is always here first
        try:
            models = list(_models_of(info, registry, made))
        except Exception as error:  # of a plugin: whatever it is, the others are listed
            inventory.warnings.append(f"the model source {quoted(info.name)} cannot say what is here: {error}")
            models = [_entry(entry, made) for entry in info.models]
        inventory.models += models
    known = {model.reference for model in inventory.models}
    for reference in dict.fromkeys(product.reference for product in made):
        if reference not in known:  # of the user's own models, or of those that were removed
            inventory.models.append(ListedModel(name=reference, reference=reference, products=_of(reference, made)))
    return inventory


def source_of(ref: ModelRef, registry: Registry) -> ModelSourceInfo:
    """The source that fetches the reference. Raises `TorchchatError` where there is none."""
    source = registry.claim("schemes", ref.scheme)
    if source is None:
        raise TorchchatError(f"nothing installed fetches {quoted(ref.scheme)} references")
    return source


def locate(ref: ModelRef, info: ModelSourceInfo) -> ModelFiles | None:
    """The files of the reference where all of them are here. Raises `TorchchatError` for a path that is no model."""
    source: Any = info.make()
    found: ModelFiles | None = source.locate(ref) if info.keeps else source.fetch(ref)
    return found


def kept_at(files: ModelFiles) -> Path:
    """The path that, given as MODEL, means the same: a folder, or the file where the folder holds other models too."""
    if files.ref.scheme == "file":
        return Path(files.ref.location).absolute()
    if files.format in WHOLE_MODEL_FORMATS:
        return files.weights[0]
    try:
        alone = files_of_folder(files.ref, files.root).weights == files.weights
    except TorchchatError:
        alone = False
    return files.root if alone else files.weights[0]


def kept_copy(files: ModelFiles, kept: Sequence[KeptModel]) -> KeptModel | None:
    """Which of the kept models the files are: by their own file, else by the folder that they lie in."""
    places = [*files.weights, files.root, *files.root.parents]
    by_path = {copy.path: copy for copy in reversed(kept)}
    return next((by_path[place] for place in places if place in by_path), None)


def _models_of(info: ModelSourceInfo, registry: Registry, made: Sequence[Product]) -> Iterator[ListedModel]:
    kept: list[KeptModel] = list(info.make().kept()) if info.keeps else []
    listed: list[KeptModel] = []
    for entry in info.models:
        files = _located(entry, registry)
        copy = kept_copy(files, kept) if files is not None else None
        listed += [copy] if copy is not None else []
        yield _entry(entry, made, kept_at(files) if files is not None else None, copy.bytes if copy else None)
    for copy in kept:
        if copy not in listed:
            yield ListedModel(name=copy.reference, reference=copy.reference, path=copy.path, bytes_here=copy.bytes,
                              products=_of(copy.reference, made))


def _located(entry: CatalogueEntry, registry: Registry) -> ModelFiles | None:
    try:
        ref = resolve(entry.reference, registry)
        return locate(ref, source_of(ref, registry))
    except TorchchatError:  # refused, so not here
        return None


def _entry(entry: CatalogueEntry, made: Sequence[Product], path: Path | None = None,
           bytes_here: int | None = None) -> ListedModel:
    return ListedModel(name=entry.alias, reference=entry.reference, licence=entry.licence, gated=entry.gated,
                       bytes=entry.bytes, path=path, bytes_here=bytes_here, products=_of(entry.reference, made))


def _of(reference: str, made: Sequence[Product]) -> tuple[Product, ...]:
    return tuple(product for product in made if product.reference == reference)


def products_of(ref: ModelRef) -> tuple[Product, ...]:
    """The files that were made from a model and are still there."""
    return _of(reference_of(ref), products())
