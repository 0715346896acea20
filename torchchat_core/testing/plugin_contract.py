"""The contract that every plugin has to pass, whatever it offers."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

import click

from torchchat_core.errors import TorchchatError
from torchchat_core.options import detail_of, from_mapping, validate, value_type
from torchchat_core.specs import (
    ANY_SCHEME,
    DEVICES,
    DTYPES,
    NAME,
    SCHEME,
    CommandInfo,
    Description,
    ExecutorInfo,
    ExporterInfo,
    ModelSourceInfo,
    QuantizerInfo,
    TokenizerInfo,
)
from torchchat_core.testing.demands import demand, demand_none, load_plugin

HEAVY = ("torch", "torchao", "torchtune", "transformers", "executorch", "sentencepiece", "tokenizers", "tiktoken",
         "huggingface_hub", "safetensors", "streamlit", "numpy", "scipy", "pandas", "pydantic", "fastapi", "requests",
         "httpx", "jinja2", "rich")
PLATFORMS = {"linux", "darwin", "win32"}
ALIAS = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # with capitals, for names such as "stories15M"
QUALIFIED = re.compile(r"[A-Za-z0-9][\w.-]*:" + NAME.pattern)

# What the factory of each kind makes: its methods, and the number of arguments that they are called with.
METHODS: dict[type[Description], dict[str, int]] = {
    ModelSourceInfo: {"fetch": 1, "open": 1, "locate": 1, "kept": 0, "remove": 1},
    TokenizerInfo: {"accepts": 1, "read": 2},
    QuantizerInfo: {"apply": 2, "needs_calibration": 1, "calibrate": 3},
    ExecutorInfo: {"load": 1},
    ExporterInfo: {"export": 1},
}
# Fields without which a description offers nothing.
NEEDED: dict[type[Description], tuple[str, ...]] = {
    TokenizerInfo: ("files",),
    QuantizerInfo: ("devices", "dtypes"),
    ExecutorInfo: ("reads", "devices", "dtypes"),
    ExporterInfo: ("writes", "suffix", "devices", "dtypes"),
}

# Imports core's part first, so that the figures are the plugin's alone; then does what every start of torchchat does.
PROBE = """
import importlib, json, sys, time
from torchchat_core.plugins import Registry
before, started = set(sys.modules), time.process_time()
Registry().add(importlib.import_module(sys.argv[1]), "probed", "probed")
print(json.dumps([1000 * (time.process_time() - started), sorted(set(sys.modules) - before)]))
"""


class PluginContract:
    """A plugin costs nothing to load, and its descriptions are whole and true.

        class TestPlugin(PluginContract):
            plugin = "my_plugin"
    """

    plugin: str  # the module that the entry point names
    import_limit_ms: float = 100.0  # CPU time that importing it and calling its hooks may take
    heavy: Sequence[str] = HEAVY  # packages that it must not import

    def test_its_hooks_are_known_and_return_descriptions(self) -> None:
        """A plugin with a misspelt hook, or one that returns something else, would be left out by every command."""
        row = load_plugin(self.plugin)
        demand(row.state == "loaded", f"the plugin {self.plugin!r} cannot be loaded: {row.reason}",
               "implement hooks of torchchat_core.hookspecs, marked with @hookimpl, each returning a list of the "
               "descriptions of torchchat_core.specs")
        demand(row.offers, f"the plugin {self.plugin!r} offers nothing",
               "implement at least one hook, and mark it with @hookimpl of torchchat_core.hookspecs")

    def test_loading_it_imports_nothing_heavy(self) -> None:
        """Every start of torchchat loads every plugin; `torchchat --help` must not wait for PyTorch."""
        imported = {module.partition(".")[0] for module in _probe(self.plugin)[1]}
        found = sorted(imported & set(self.heavy))
        demand(not found, f"loading {self.plugin!r} imports {', '.join(found)}",
               "import it in the module that the factory names, or inside the functions that need it")

    def test_loading_it_takes_little_time(self) -> None:
        """Thirty plugins have to load without a person noticing."""
        taken = min(_probe(self.plugin)[0], *(_fresh_probe(self.plugin)[0] for _ in range(2)))
        demand(taken < self.import_limit_ms,
               f"loading {self.plugin!r} takes {taken:.0f} ms of CPU time; {self.import_limit_ms:.0f} ms are permitted",
               "compute and import nothing at the top of the module; `python -X importtime` shows what takes the time")

    def test_its_factories_make_what_their_kind_asks_for(self) -> None:
        """A factory is first used in the middle of a user's work: a wrong path must not wait until then."""
        faults = [fault for info in self._offers() for fault in _factory_faults(info)]
        demand_none(faults, "let `factory` be 'package.module:attribute' of something that is called without "
                            "arguments and makes an object with the methods of the protocol in torchchat_core.specs")

    def test_its_options_are_well_formed(self) -> None:
        """The command line, recipes and documents are made of the options' declarations."""
        faults = [fault for info in self._offers() if info.options is not None for fault in _option_faults(info)]
        demand_none(faults, "declare each field as `name: type = option(default, \"help\", ...)` with "
                            "torchchat_core.options.option, of type int, float, bool, str or tuple[str, ...]")

    def test_its_options_survive_json(self) -> None:
        """Recipes and exported files keep options as JSON: what is read has to be what was written."""
        faults = [fault for info in self._offers() if info.options is not None for fault in _json_faults(info)]
        demand_none(faults, "use values that JSON has: numbers, texts, booleans, and tuples of them")

    def test_its_capabilities_are_known_and_complete(self) -> None:
        """Which combinations work is computed from what plugins declare; an unknown name would match nothing."""
        faults = [fault for info in self._offers() for fault in _capability_faults(info)]
        demand_none(faults, "correct the description; the known names stand in torchchat_core.specs")

    def _offers(self) -> list[Description]:
        return load_plugin(self.plugin).offers


def _fresh_probe(plugin: str) -> tuple[float, list[str]]:
    """Milliseconds of CPU time that loading the plugin takes in a process of its own, and the modules it imports."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-P", "-c", PROBE, plugin], env=environment, capture_output=True, text=True,
                          timeout=300, check=False)
    last_line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    demand(done.returncode == 0, f"importing {plugin!r} fails in a fresh process: {last_line}",
           "see that the module can be imported by itself, wherever Python is started")
    milliseconds, modules = json.loads(done.stdout.splitlines()[-1])
    return milliseconds, modules


_probe = functools.cache(_fresh_probe)


def _factory_faults(info: Description) -> Iterator[str]:
    what = f"the factory of {info.kind} {info.name!r}"
    try:
        made = info.make()
    except Exception as error:
        yield f"{what} raises {type(error).__name__}: {error}"
        return
    if isinstance(info, CommandInfo):
        if not isinstance(made, click.Command):
            yield f"{what} names {made!r:.60}, which is no click command"
        return
    for method, count in _methods(info).items():
        function = getattr(made, method, None)
        if not callable(function):
            yield f"{what} makes a {type(made).__name__}, which has no method {method}()"
        elif not _takes(function, count):
            yield f"{what} makes a {type(made).__name__}, whose {method}() does not take {count} argument(s)"


def _methods(info: Description) -> dict[str, int]:
    methods = METHODS.get(type(info), {})
    if isinstance(info, QuantizerInfo) and not info.calibrates:
        return {"apply": methods["apply"]}
    if not isinstance(info, ModelSourceInfo):
        return methods
    declared = {"fetch": bool(info.schemes), "open": bool(info.formats)}
    return {name: count for name, count in methods.items() if declared.get(name, info.keeps)}


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a function of an extension module, which does not say what it takes
        return True
    return True


def _option_faults(info: Description) -> Iterator[str]:
    assert info.options is not None
    what = f"the options of {info.kind} {info.name!r}"
    for declared in fields(info.options):
        try:
            detail = detail_of(declared)
            wanted = value_type(info.options, declared.name)
        except Exception as error:
            yield f"{what}: {error}"
            continue
        if not detail.help.strip():
            yield f"{what}: {declared.name!r} has no help"
        if wanted not in (int, float, bool, str, tuple):
            yield f"{what}: {declared.name!r} is of type {wanted.__name__}, which has no flag"
    try:
        validate(info.options())
    except TypeError as error:
        yield f"{what} cannot be made without arguments: {error}"
    except TorchchatError as error:
        yield f"{what} have a default that is not permitted: {error}"


def _json_faults(info: Description) -> Iterator[str]:
    assert info.options is not None
    what = f"the options of {info.kind} {info.name!r}"
    made = info.options()
    try:
        read: Any = from_mapping(info.options, json.loads(json.dumps(asdict(made))))
    except (TypeError, ValueError, TorchchatError) as error:
        yield f"{what} cannot be written as JSON and read: {error}"
        return
    if read != made:
        yield f"{what} come back from JSON as {read!r} instead of {made!r}"


def _capability_faults(info: Description) -> Iterator[str]:
    what = f"{info.kind} {info.name!r}"
    known: dict[str, Callable[[str], object]] = {
        "devices": DEVICES.__contains__,
        "dtypes": DTYPES.__contains__,
        "platforms": PLATFORMS.__contains__,
        "replaces": QUALIFIED.fullmatch,
        "formats": NAME.fullmatch,
        "reads": NAME.fullmatch,
        "schemes": NAME.fullmatch if isinstance(info, ModelSourceInfo) else _is_scheme,
        "aliases": ALIAS.fullmatch,
    }
    for field_name, knows in known.items():
        unknown = sorted(name for name in getattr(info, field_name, ()) if not knows(name))
        if unknown:
            yield f"{what} declares the {field_name} {', '.join(map(repr, unknown))}, which torchchat does not know"
    missing = [name for name in NEEDED.get(type(info), ()) if not getattr(info, name)]
    if missing:
        yield f"{what} declares no {' and no '.join(missing)}"
    if isinstance(info, ModelSourceInfo) and not (info.schemes or info.formats):
        yield f"{what} declares no schemes and no formats"
    if isinstance(info, ExporterInfo) and not re.fullmatch(r"\.[\w-]+", info.suffix):
        yield f"{what} declares the suffix {info.suffix!r}; it has to be like '.pte'"


def _is_scheme(name: str) -> bool:
    return name == ANY_SCHEME or bool(SCHEME.fullmatch(name))
