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


def read_recipe(text: str, registry: Registry) -> Recipe:
    """The recipe that a user means: a JSON object, a file, or the name of a scheme.

    Raises `TorchchatError` for what is none of them, a scheme that no installed quantizer makes, or wrong options.
    """
    sections = _sections(text, registry)
    return Recipe(tuple(_step(scheme, options, registry) for scheme, options in sections.items()))


def _sections(text: str, registry: Registry) -> Mapping[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
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


def _step(scheme: str, options: object, registry: Registry) -> Step:
    makers = [info for info in registry.infos(QuantizerInfo) if info.scheme == scheme]
    known = _schemes(registry)
    if not makers:
        raise TorchchatError(f"no installed quantizer makes {scheme!r}; schemes here: {', '.join(known) or 'none'}",
                             did_you_mean(scheme, known) or "install the plugin that makes it")
    names = {info.name for info in makers}
    quantizer = registry.find(QuantizerInfo, min(names))  # several owners of one name are an error there
    if not isinstance(options, Mapping):
        raise TorchchatError(f"the options of {scheme!r} are {options!r}; they have to be a JSON object")
    if quantizer.options is None:
        if options:
            raise TorchchatError(f"{scheme!r} has no options; {next(iter(options))!r} was given")
        return Step(scheme, quantizer, None)
    return Step(scheme, quantizer, from_mapping(quantizer.options, options))


def _schemes(registry: Registry) -> list[str]:
    return sorted({info.scheme for info in registry.infos(QuantizerInfo)})
