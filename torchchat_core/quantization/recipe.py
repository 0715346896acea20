"""A recipe is a JSON object: each key a scheme such as "linear:int8", each value the options of its quantizer.

    {"linear:int8": {"groupsize": 64}, "embedding:int8": {}}

`--quantize` takes such an object, a file that holds one, or a scheme's name alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchchat_core.errors import TorchchatError, did_you_mean
from torchchat_core.models.transformer import Transformer
from torchchat_core.options import from_mapping
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded, read_json
from torchchat_core.specs import QuantizerInfo, QuantReport


@dataclass(frozen=True)
class Step:
    """One section of a recipe: what makes the layers, and its options, checked."""

    scheme: str
    quantizer: QuantizerInfo
    options: Any


@dataclass(frozen=True)
class Recipe:
    """The sections in the order in which they are applied."""

    steps: tuple[Step, ...]

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(step.scheme for step in self.steps)

    def apply(self, model: Transformer) -> list[QuantReport]:
        """Replaces the layers of `model` in place; one report for each section."""
        return [step.quantizer.make().apply(model, step.options) for step in self.steps]


def read_recipe(text: str, registry: Registry, device: str, dtype: str) -> Recipe:
    """The recipe that a user means: a JSON object, a file, or the name of a scheme.

    Where several quantizers make a scheme, the one for the device and the dtype is taken. Raises `TorchchatError`
    for what is no recipe, a scheme that no installed quantizer makes, or wrong options.
    """
    sections = _sections(text, registry)
    if not sections:
        raise TorchchatError("the recipe is empty", 'give a scheme, such as {"linear:int8": {}}')
    return Recipe(tuple(_step(scheme, options, registry, device, dtype) for scheme, options in sections.items()))


def _sections(text: str, registry: Registry) -> Mapping[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            raise TorchchatError(f"the recipe is not JSON: {error}") from None
        return dict(found)
    if text in _schemes(registry):
        return {text: {}}
    path = expanded(text)
    if path.is_file():
        return read_json(path)
    known = _schemes(registry)
    raise TorchchatError(f"there is no recipe, file or scheme {text!r}; schemes here: {', '.join(known) or 'none'}",
                         did_you_mean(text, known) or "give a scheme, a JSON file, or a JSON object")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TorchchatError(f"the recipe has {max(names, key=names.count)!r} twice")
    return found


def _step(scheme: str, options: object, registry: Registry, device: str, dtype: str) -> Step:
    makers = [info for info in registry.infos(QuantizerInfo) if info.scheme == scheme]
    known = _schemes(registry)
    if not makers:
        raise TorchchatError(f"no installed quantizer makes {scheme!r}; schemes here: {', '.join(known) or 'none'}",
                             did_you_mean(scheme, known) or "install the plugin that makes it")
    fitting = [info for info in makers if device in info.devices and dtype in info.dtypes] or makers
    quantizer = registry.find(QuantizerInfo, fitting[0].name)  # several owners of one name are an error there
    if not isinstance(options, Mapping):
        raise TorchchatError(f"the options of {scheme!r} are {options!r}; they have to be a JSON object")
    if quantizer.options is None:
        if options:
            raise TorchchatError(f"{scheme!r} has no options; {next(iter(options))!r} was given")
        return Step(scheme, quantizer, None)
    return Step(scheme, quantizer, from_mapping(quantizer.options, options))


def _schemes(registry: Registry) -> list[str]:
    return sorted({info.scheme for info in registry.infos(QuantizerInfo)})
