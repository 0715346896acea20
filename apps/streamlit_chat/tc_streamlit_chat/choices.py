"""What pages offer to choose from: models, executors and recipes that are installed and fit."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.services import Services
from torchchat_core.amounts import bytes_text
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.fitting import Fitting, fitting
from torchchat_core.pipeline import DEFAULT_MODEL, ModelRequest
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import recipe_names
from torchchat_core.small_files import expanded
from torchchat_core.sources.inventory import ListedModel, take_inventory
from torchchat_core.specs import QuantizerInfo

SECONDS = 5.0  # that an inventory holds: looking at every folder takes a while
AUTO = "auto"  # among the executors
FASTEST = "fast"  # among the devices


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One model that can be chosen."""

    model: str  # as MODEL of the command line
    label: str
    here: bool  # whether it can be opened without a download


class Choices:
    """One for the process. May be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: tuple[float, list[Choice]] = (float("-inf"), [])
        self._fitting: dict[ModelRequest, tuple[float, Fitting]] = {}

    def models(self, services: Services) -> list[Choice]:
        """That of the command line first, then what is on this machine, then what can be downloaded."""
        if not isinstance(services.models, LocalModels):
            return [Choice(model=name, label=name, here=True) for name in services.models.models]
        with self._lock:
            if time.monotonic() - self._models[0] > SECONDS:
                self._models = time.monotonic(), _inventory(services.models)
            return list(self._models[1])

    def fitting(self, services: Services, request: ModelRequest) -> Fitting:
        """Raises `TorchchatError` for a model that cannot be opened."""
        now = time.monotonic()
        with self._lock:
            self._fitting = {key: each for key, each in self._fitting.items() if now - each[0] < SECONDS}
            known = self._fitting.get(request)
        if known is not None:
            return known[1]
        found = fitting(request, services.registry)  # without the lock: nobody waits for another one's model
        with self._lock:
            self._fitting[request] = now, found
        return found

    def is_here(self, services: Services, model: str | None) -> bool:
        """Whether the model can be looked at without a download."""
        if model is None or not isinstance(services.models, LocalModels):
            return True
        listed = next((each for each in self.models(services) if each.model == model), None)
        return listed.here if listed is not None else expanded(model).exists()

    def may_use(self, services: Services, model: str | None) -> bool:
        """Whether a page may name the model: strangers choose from what is here, this machine's user names any."""
        return services.private or model is None or any(each.model == model and each.here
                                                        for each in self.models(services))


choices = Choices()


def offered(chosen: Iterable[str | None], options: Collection[str]) -> None:
    """Raises `TorchchatError` for what was not offered: a page is not the only thing that can send choices."""
    strange = next((each for each in chosen if each not in options), None)
    if strange is not None:
        raise TorchchatError(f"{quoted(strange)} cannot be chosen here", "choose one of the list")


def known_recipes(registry: Registry) -> set[str]:
    """Those that have a name, whether or not a model can be run with them."""
    return {*recipe_names(), *(info.scheme for info in registry.infos(QuantizerInfo))}


def base_name(services: Services) -> str:
    """What the model of the command line is called."""
    if not isinstance(services.models, LocalModels):
        return services.models.model or "the server's model"
    return services.models.base.model or services.models.base.checkpoint_path or DEFAULT_MODEL


def short_name(model: str) -> str:
    """The last part of a path, and any other name as it is: owner/name of a hub looks like a path, and is none."""
    path = Path(model)
    return path.name if path.name not in ("", "..") and (path.is_absolute() or path.parts[0] in ("~", "..")
                                                         or model.startswith("./")) else model


def _inventory(models: LocalModels) -> list[Choice]:
    listed = take_inventory(models.registry).models
    here = [choice for model in listed for choice in _here(model)]
    away = [Choice(model=model.name, label=_download(model), here=False)
            for model in listed if model.path is None and model.name != model.reference]
    return [*here, *away]


def _here(model: ListedModel) -> Sequence[Choice]:
    name = DEFAULT_MODEL if model.reference == DEFAULT_MODEL else model.name  # which it has without a MODEL
    found = [Choice(model=name, label=short_name(name), here=True)] if model.path is not None else []
    for product in model.products:
        label = f"{Path(product.path).name} \u2013 {product.kind} of {short_name(model.name.removeprefix('file:'))}"
        found.append(Choice(model=product.path, label=label, here=True))
    return found


def _download(model: ListedModel) -> str:
    size = f", {bytes_text(model.bytes)} to download" if model.bytes else ", to be downloaded"
    return f"{model.name}{size}{', asks its owner' if model.gated else ''}"


