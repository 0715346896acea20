"""The registry: finds plugins through entry points, keeps the broken ones out, and answers by name.

pluggy's own `load_setuptools_entrypoints` stops at the first plugin that cannot be imported and forgets
duplicates in silence; this loader turns each such case into one line and a row that can be listed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from torchchat_core import hookspecs
from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.known_plugins import Offer as KnownOffer
from torchchat_core.known_plugins import install_command, providers
from torchchat_core.specs import (
    CommandInfo,
    Description,
    ExecutorInfo,
    ExporterInfo,
    ModelSourceInfo,
    QuantizerInfo,
    TokenizerInfo,
)

HOOKS: Mapping[str, type[Description]] = {
    "torchchat_model_sources": ModelSourceInfo,
    "torchchat_tokenizers": TokenizerInfo,
    "torchchat_quantizers": QuantizerInfo,
    "torchchat_executors": ExecutorInfo,
    "torchchat_exporters": ExporterInfo,
    "torchchat_commands": CommandInfo,
}
PROVIDED: Mapping[type[Description], KnownOffer] = {CommandInfo: "commands", ExecutorInfo: "executors",
                                                    ExporterInfo: "exporters"}  # offers that `find` looks up by name
STRICT = "TORCHCHAT_STRICT_PLUGINS"
TRACE = "TORCHCHAT_TRACE_PLUGINS"
NO_AUTOLOAD = "TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD"
CORE = "torchchat-core"

Info = TypeVar("Info", bound=Description)


@dataclass
class Plugin:
    """One plugin as `torchchat plugins` lists it."""

    name: str  # of the entry point
    distribution: str
    version: str
    state: str = "loaded"  # "loaded", "failed" or "disabled"
    reason: str | None = None  # why it failed
    offers: list[Description] = field(default_factory=list)

    @property
    def qualified_name(self) -> str:
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True)
class Offer:
    """A description and who made it; identity is `distribution:name`."""

    distribution: str
    info: Description

    @property
    def qualified_name(self) -> str:
        return f"{self.distribution}:{self.info.name}"


class Registry:
    """All that is installed. Build it with `load_registry`."""

    def __init__(self, prefer: Mapping[str, str] | None = None) -> None:
        self.plugins: list[Plugin] = []
        self.warnings: list[str] = []
        self._prefer = dict(prefer or {})  # bare name -> qualified name
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._offers: list[Offer] = []
        if os.environ.get(TRACE) == "1":
            self._manager.add_hookcall_monitoring(lambda *_: None, _trace)

    def add(self, module: object, name: str, distribution: str, version: str = "") -> Plugin:
        """Registers a plugin; where it is faulty, it is kept out and the reason is noted."""
        plugin = Plugin(name=name, distribution=distribution, version=version)
        self.plugins.append(plugin)
        try:
            self._register(module, plugin)
        except (Exception, SystemExit) as error:
            self._reject(plugin, error)
        return plugin

    def add_entry_point(self, entry: EntryPoint) -> Plugin:
        """Imports the plugin that the entry point names and registers it, or notes why that failed."""
        name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:
            plugin = Plugin(name=entry.name, distribution=name, version=version)
            self.plugins.append(plugin)
            self._reject(plugin, error)
            return plugin
        return self.add(module, entry.name, name, version)

    def offers(self, kind: type[Info]) -> list[tuple[str, Info]]:
        """(qualified name, description) of everything of that kind, in order of name."""
        found = [(offer.qualified_name, offer.info) for offer in self._offers if isinstance(offer.info, kind)]
        return sorted(found, key=lambda pair: pair[0])

    def settled(self, kind: type[Info]) -> list[tuple[str, Info]]:
        """As `offers`, without those that another one replaces, or whose name the user prefers to mean another."""
        offers = self.offers(kind)
        replaced = {qualified for _, info in offers for qualified in info.replaces}
        names = {info.name for qualified, info in offers if self._prefer.get(info.name) == qualified}
        return [(qualified, info) for qualified, info in offers
                if qualified not in replaced and (info.name not in names or self._prefer[info.name] == qualified)]

    def infos(self, kind: type[Info]) -> list[Info]:
        """The settled descriptions of that kind, in order of qualified name."""
        return [info for _, info in self.settled(kind)]

    def contested(self, kind: type[Info], name: str) -> bool:
        """Whether several plugins offer the bare name, and nothing settles which one it means."""
        return len(self._owners(kind).get(name, [])) > 1

    def claim(self, claimed: str, value: str) -> ModelSourceInfo | None:
        """The model source whose field `claimed` ("schemes", "formats", "aliases") has `value`; None where none has.

        What core claims stays core's, unless a plugin replaces the source. Raises `TorchchatError` where several
        plugins claim it.
        """
        claims = [(qualified, info) for qualified, info in self.settled(ModelSourceInfo)
                  if value in getattr(info, claimed)]
        own = [claim for claim in claims if claim[0].startswith(f"{CORE}:")] or claims
        if len(own) > 1:
            listed = " and ".join(qualified for qualified, _ in own)
            raise TorchchatError(f"{quoted(value)} is claimed by the model sources {listed}",
                                 f"leave one of them out: -p no:{own[0][0].partition(':')[0]}")
        return own[0][1] if own else None

    def find(self, kind: type[Info], name: str) -> Info:
        """The one description of that kind called `name`, bare or as `distribution:name`.

        Raises `TorchchatError` where there is none (with near matches), or where several have the bare name.
        """
        owners = self._owners(kind)
        by_qualified_name = dict(self.offers(kind))
        if name in by_qualified_name:
            return by_qualified_name[name]
        matches = owners.get(name, [])
        if len(matches) == 1:
            return by_qualified_name[matches[0]]
        if matches:
            raise TorchchatError(f"{kind.kind} {quoted(name)} is ambiguous: {' and '.join(matches)} have that name",
                                 f"give the full name, such as {matches[0]}")
        known = sorted(owners)
        message = f"there is no {kind.kind} {quoted(name)}; installed: {', '.join(known) or 'none'}"
        hint = self.how_to_get(PROVIDED[kind], name) if kind in PROVIDED else None
        raise TorchchatError(message, hint or did_you_mean(name, known))

    def how_to_get(self, offer: KnownOffer, name: str | None = None) -> str | None:
        """Return the fix that makes a known plugin provide `name`, or any offer of that kind if `name` is None.

        The fix is to install it, to stop disabling it with -p, or to see why it failed. Returns None if no known plugin
        provides it, or if the plugin is loaded.
        """
        found = providers(offer, name)
        if not found:
            return None
        states = {plugin.distribution: plugin for plugin in self.plugins}
        plugin = states.get(found[0])
        if plugin is None:
            return install_command(found if name is None and offer == "exporters" else found[:1])
        if plugin.state == "disabled":
            return f"leave out -p no:{plugin.name}"
        return "torchchat plugins, which says why it failed" if plugin.state == "failed" else None

    def _register(self, module: object, plugin: Plugin) -> None:
        _check_hooks(module)
        self._manager.register(module, name=f"{plugin.qualified_name}#{len(self.plugins)}")
        try:
            plugin.offers = list(self._describe(module))
        except BaseException:
            self._manager.unregister(module)
            raise
        self._offers += [Offer(plugin.distribution, info) for info in plugin.offers]

    def _describe(self, module: object) -> Iterable[Description]:
        """The descriptions that one plugin's hooks return, checked for their type and for repeated names."""
        others = [other for other in self._manager.get_plugins() if other is not module]
        seen = set()
        for hook, kind in HOOKS.items():
            caller = self._manager.subset_hook_caller(hook, others)
            returns = caller()
            if len(returns) < len(caller.get_hookimpls()):  # pluggy drops None
                raise TorchchatError(f"{hook} has to return a list of {kind.__name__}, not None")
            for returned in returns:
                if not isinstance(returned, list | tuple) or not all(isinstance(info, kind) for info in returned):
                    raise TorchchatError(f"{hook} has to return a list of {kind.__name__}, not {quoted(returned)}")
                for info in returned:
                    if (kind, info.name) in seen:
                        raise TorchchatError(f"it offers two {kind.kind}s called {quoted(info.name)}")
                    seen.add((kind, info.name))
                    yield info

    def _reject(self, plugin: Plugin, error: BaseException) -> None:
        if os.environ.get(STRICT) == "1":
            raise error
        plugin.state = "failed"
        plugin.reason = str(error) if isinstance(error, TorchchatError) else f"{type(error).__name__}: {error}"
        plugin.reason = " ".join(plugin.reason.split())
        self.warnings.append(f"plugin {plugin.qualified_name} is left out: {plugin.reason}")

    def _owners(self, kind: type[Description]) -> dict[str, list[str]]:
        """Bare name -> the qualified names that it may mean: one, unless there is a clash that nothing settles."""
        owners: dict[str, list[str]] = {}
        for qualified, info in self.settled(kind):
            owners.setdefault(info.name, []).append(qualified)
        return owners

    def warn_of_clashes(self) -> None:
        """Adds a warning for every bare name that several plugins offer."""
        for kind in HOOKS.values():
            for name, qualified_names in self._owners(kind).items():
                if len(qualified_names) > 1:
                    self.warnings.append(f"{kind.kind} {quoted(name)} is offered by "
                                         f"{' and by '.join(qualified_names)}; "
                                         "use the full name")
        for claimed in ("schemes", "formats", "aliases"):
            owners: dict[str, list[str]] = {}
            for qualified, source in self.settled(ModelSourceInfo):
                for value in getattr(source, claimed):
                    owners.setdefault(value, []).append(qualified)
            self.warnings += [f"{claimed}: {quoted(value)} is claimed by {' and by '.join(names)}"
                              for value, names in sorted(owners.items()) if len(names) > 1]


def _trace(outcome: pluggy.Result[Any], hook: str, implementations: Sequence[pluggy.HookImpl],
           arguments: Mapping[str, Any]) -> None:
    """Prints a hook call and what came of it."""
    given = ", ".join(f"{name}={quoted(value)}" for name, value in arguments.items())
    for implementation in implementations:
        plugin = implementation.plugin_name.partition("#")[0]
        result = repr(outcome.exception) if outcome.exception else repr(outcome.get_result())
        print(f"trace: {plugin} {hook}({given}) -> {result}", file=sys.stderr)  # noqa: T201 - asked for


def _check_hooks(module: object) -> None:
    """Raises `TorchchatError` for a hook that does not exist or is not marked: pluggy would overlook either."""
    for name in dir(module):
        function = getattr(module, name)
        if not callable(function) or isinstance(function, ModuleType):
            continue
        marked = hasattr(function, f"{hookspecs.PROJECT}_impl")
        if not marked and not name.startswith("torchchat_"):
            continue
        if name not in HOOKS:
            hint = did_you_mean(name, HOOKS)
            raise TorchchatError(f"there is no hook {quoted(name)}", hint or f"the hooks are {', '.join(HOOKS)}")
        if not marked:
            raise TorchchatError(f"{name} lacks the @hookimpl decorator", "import it from torchchat_core.hookspecs")


def load_registry(disabled: Sequence[str] = (), prefer: Mapping[str, str] | None = None) -> Registry:
    """The built-ins and every installed plugin but the `disabled` ones (by entry point or distribution name).

    `TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD=1` leaves only the built-ins; `TORCHCHAT_STRICT_PLUGINS=1` lets the first
    fault of a plugin through as the exception that it is; `TORCHCHAT_TRACE_PLUGINS=1` prints every hook call.
    """
    from torchchat_core import __version__, builtins

    registry = Registry(prefer)
    registry.add(builtins, "builtins", CORE, __version__)
    if os.environ.get(NO_AUTOLOAD) != "1":
        for entry in _unique_entry_points():
            if _names(entry) & set(disabled):
                distribution = entry.dist.name if entry.dist else "unknown"
                version = entry.dist.version if entry.dist else ""
                registry.plugins.append(Plugin(entry.name, distribution, version, state="disabled"))
            else:
                registry.add_entry_point(entry)
    known = {name for plugin in registry.plugins
             for name in (plugin.name, plugin.distribution, plugin.qualified_name)}
    registry.warnings += [f"there is no plugin {quoted(name)} to disable" for name in disabled if name not in known]
    registry.warn_of_clashes()
    return registry


def _names(entry: EntryPoint) -> set[str]:
    distribution = entry.dist.name if entry.dist else "unknown"
    return {entry.name, distribution, f"{distribution}:{entry.name}"}


def _unique_entry_points() -> list[EntryPoint]:
    """The group's entry points, each once (an editable install can be found by two paths), in order of name."""
    found: dict[Any, EntryPoint] = {}
    for entry in entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        found.setdefault((entry.dist.name if entry.dist else "", entry.name, entry.value), entry)
    return [found[key] for key in sorted(found)]
