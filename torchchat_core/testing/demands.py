"""What the contracts are written with: demands that say how to mend a fault, and the plugin under test."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torchchat_core import builtins
from torchchat_core.errors import TorchchatError
from torchchat_core.options import from_mapping
from torchchat_core.plugins import CORE, Plugin, Registry
from torchchat_core.specs import Description

Info = TypeVar("Info", bound=Description)
REFUSE = "check first, and raise torchchat_core.errors.TorchchatError with the value and the range"


def demand(holds: object, wrong: str, mend: str) -> None:
    """Fails the test unless `holds`; `wrong` says what is the matter and `mend` what its author can do."""
    __tracebackhide__ = True
    if not holds:
        raise AssertionError(f"{wrong}\n  to mend it: {mend}")


def demand_none(faults: list[str], mend: str) -> None:
    """Fails the test where there are `faults`, and lists all of them."""
    __tracebackhide__ = True
    demand(not faults, "; ".join(faults), mend)


@contextmanager
def refusal(what: str) -> Iterator[None]:
    """Demands that the block raises `TorchchatError` and nothing else; `what` is what it tries."""
    __tracebackhide__ = True
    try:
        yield
    except TorchchatError:
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}\n  to mend it: {REFUSE}") from error
    raise AssertionError(f"{what} was accepted\n  to mend it: {REFUSE}")


def load_plugin(plugin: str) -> Plugin:
    """The row that the module `plugin` gets in a registry of its own."""
    try:
        module = importlib.import_module(plugin)
    except Exception as error:
        raise AssertionError(f"the module {plugin!r} cannot be imported: {type(error).__name__}: {error}\n"
                             "  to mend it: set `plugin` to the module that the entry point names") from error
    return Registry().add(module, plugin, plugin)


def registry_with(plugin: str) -> Registry:
    """A registry of core's own offers and those of the module `plugin`."""
    registry = Registry()
    for module in dict.fromkeys((builtins, importlib.import_module(plugin))):
        registry.add(module, module.__name__, CORE if module is builtins else plugin)
    return registry


def described(plugin: str, kind: type[Info], name: str) -> Info:
    """The description called `name` that the plugin offers."""
    row = load_plugin(plugin)
    demand(row.state == "loaded", f"the plugin {plugin!r} cannot be loaded: {row.reason}", "see PluginContract")
    found = [info for info in row.offers if isinstance(info, kind) and info.name == name]
    known = [info.name for info in row.offers if isinstance(info, kind)]
    demand(found, f"the plugin {plugin!r} offers no {kind.kind} {name!r}, but {known}",
           f"set `plugin` and `name` of the contract to those of the {kind.kind} that it is to test")
    return found[0]


def options_of(info: Description, values: Mapping[str, Any]) -> Any:
    """The options of a description made of `values`, as a recipe or the command line makes them."""
    return None if info.options is None else from_mapping(info.options, values)
