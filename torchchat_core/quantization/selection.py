"""Which layers a section of a recipe takes.

A section with "layers" takes those whose names match one of its patterns. A section without takes the rest: all layers
of its kind that no other section takes. "except" leaves layers out, in both. A layer that two sections name, and two
sections of one kind that both want the rest, are errors; so is a pattern that matches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.quantization.replacing import KINDS

LAYERS, EXCEPT = "layers", "except"


@dataclass(frozen=True)
class Selection:
    """The patterns of one section, of names such as "model.layers.0.mlp.up_proj": * stands for anything."""

    scheme: str
    layers: tuple[str, ...] | None  # None: the rest
    excepted: tuple[str, ...]

    @classmethod
    def split(cls, scheme: str, section: Mapping[str, Any]) -> tuple[Selection, dict[str, Any]]:
        """What a section says of layers, and the options that are left. Raises `TorchchatError` for what is no list."""
        options = {name: value for name, value in section.items() if name not in (LAYERS, EXCEPT)}
        layers = _patterns(scheme, LAYERS, section[LAYERS]) if LAYERS in section else None
        return cls(scheme, layers, _patterns(scheme, EXCEPT, section.get(EXCEPT, []))), options

    @property
    def kind(self) -> str:
        return self.scheme.partition(":")[0]


def _patterns(scheme: str, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise TorchchatError(f"{quoted(key)} of {quoted(scheme)} is {quoted(value)}; it has to be a list of names of "
                             "layers",
                             f'such as "{key}": ["lm_head", "model.layers.*.mlp.*"]')
    if key == LAYERS and not value:
        raise TorchchatError(f"{quoted(key)} of {quoted(scheme)} is empty: the section would take no layer",
                             "leave it out")
    return tuple(value)


def check_selections(selections: Sequence[Selection]) -> None:
    """Raises `TorchchatError` where two sections of one kind both take whatever is left."""
    for kind in {selection.kind for selection in selections}:
        rest = [each.scheme for each in selections if each.kind == kind and each.layers is None]
        if len(rest) > 1:
            raise TorchchatError(f"{quoted(rest[0])} and {quoted(rest[1])} both take all {kind} layers",
                                 f'give one of them the names of its own, such as "{LAYERS}": ["lm_head"]')


def layers_of_sections(model: nn.Module, selections: Sequence[Selection]) -> tuple[list[set[str]], list[str]]:
    """The names of the layers of each section, and of those of their kinds that no section takes.

    Raises `TorchchatError` for a pattern that matches no layer, and a layer that two sections name.
    """
    known = {kind: _names(model, kind) for kind in {selection.kind for selection in selections}}
    named = [_matching(each, LAYERS, each.layers or (), known[each.kind]) for each in selections]
    excepted = [_matching(each, EXCEPT, each.excepted, known[each.kind]) for each in selections]
    taken = [names - left for names, left in zip(named, excepted, strict=True)]
    owners: dict[str, str] = {}
    for selection, names in zip(selections, taken, strict=True):
        for name in sorted(names):
            if name in owners:
                raise TorchchatError(f"{quoted(owners[name])} and {quoted(selection.scheme)} both name the layer "
                                     f"{quoted(name)}",
                                     f'name it in one of them, or put it under "{EXCEPT}"')
            owners[name] = selection.scheme
    chosen = [names if each.layers is not None else set(known[each.kind]) - owners.keys() - left
              for each, names, left in zip(selections, taken, excepted, strict=True)]
    all_chosen = set[str]().union(*chosen)
    return chosen, [name for names in known.values() for name in names if name not in all_chosen]


def _names(model: nn.Module, kind: str) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, KINDS[kind])]


def _matching(selection: Selection, key: str, patterns: Iterable[str], known: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matching = [name for name in known if fnmatchcase(name, pattern)]
        if not matching:
            raise TorchchatError(f'"{key}" of {quoted(selection.scheme)} has {quoted(pattern)}, which is no '
                                 f"{selection.kind} layer of this model", did_you_mean(pattern, known)
                                 or f"layers are called {quoted(known[0])}" if known else None)
        found.update(matching)
    return found


class _Hidden(nn.Module):
    """Stands in a layer's place while others are quantised, and computes what it does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a submodule: nothing that walks through the model finds it

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.__dict__["layer"](x)
        return output


@contextmanager
def only(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Within it, a quantizer finds the named layers alone, and replaces them; the others come back afterwards."""
    kinds = tuple(KINDS.values())
    others = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds) and name not in names}
    for name, layer in others.items():
        model.set_submodule(name, _Hidden(layer))
    try:
        yield
    finally:
        for name, layer in others.items():
            model.set_submodule(name, layer)
