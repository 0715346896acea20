"""The plugin contract finds each kind of fault, in plugins that are written to disk as a third party's would be."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import pytest

from torchchat_core.testing import PluginContract

RIGHT = '''
from __future__ import annotations
from dataclasses import dataclass
from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.specs import (
    CatalogueEntry, CommandInfo, ExecutorInfo, ExporterInfo, ModelSourceInfo, QuantizerInfo, TokenizerInfo)

CPU, FP32 = frozenset({"cpu"}), frozenset({"fp32"})

@dataclass(frozen=True)
class Options:
    groupsize: int | None = option(64, "weights that share one scale", minimum=1)
    ratio: float = option(0.5, "between two things", minimum=0, maximum=1)
    exact: bool = option(False, "slower")
    layers: tuple[str, ...] = option((), "only these")

class Maker:
    def fetch(self, ref): ...
    def open(self, files): ...
    def locate(self, ref): ...
    def kept(self): ...
    def remove(self, ref): ...
    def accepts(self, path): ...
    def read(self, path, settings): ...
    def apply(self, model, options): ...
    def load(self, request): ...
    def export(self, request): ...

@hookimpl
def torchchat_model_sources():
    return [ModelSourceInfo(name="s", summary="s", factory=f"{__name__}:Maker", schemes=frozenset({"mine"}),
                            formats=frozenset({"mine"}), keeps=True,
                            models=(CatalogueEntry(alias="tiny-1B", reference="mine:tiny"),))]

@hookimpl
def torchchat_tokenizers():
    return [TokenizerInfo(name="t", summary="t", factory=f"{__name__}:Maker", files=("*.mine",))]

@hookimpl
def torchchat_quantizers():
    return [QuantizerInfo(name="q", summary="q", factory=f"{__name__}:Maker", scheme="linear:int8", options=Options,
                          devices=CPU, dtypes=FP32)]

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name="e", summary="e", factory=f"{__name__}:Maker", reads=frozenset({"module"}), devices=CPU,
                         dtypes=FP32, schemes=frozenset({"linear:int8"}), platforms=frozenset({"linux", "darwin"}))]

@hookimpl
def torchchat_exporters():
    return [ExporterInfo(name="x", summary="x", factory=f"{__name__}:Maker", writes="mine", suffix=".mine", devices=CPU,
                         dtypes=FP32)]

@hookimpl
def torchchat_commands():
    return [CommandInfo(name="c", summary="c", factory="torchchat_core.cli.generate:generate")]
'''

HOOKS = "test_its_hooks_are_known_and_return_descriptions"
IMPORTS, TIME = "test_loading_it_imports_nothing_heavy", "test_loading_it_takes_little_time"
FACTORIES = "test_its_factories_make_what_their_kind_asks_for"
OPTIONS, JSON = "test_its_options_are_well_formed", "test_its_options_survive_json"
CAPABILITIES = "test_its_capabilities_are_known_and_complete"

# What is replaced in the right plugin by what, the test that has to fail, and words that it has to say.
TABLE = {
    "raising": ("from dataclasses", "raise OSError('no luck')\nfrom dataclasses", HOOKS, "OSError: no luck"),
    "misspelt": ("torchchat_executors", "torchchat_executor", HOOKS, "did you mean torchchat_executors"),
    "unmarked": ("@hookimpl\ndef torchchat_tok", "def torchchat_tok", HOOKS, "lacks the @hookimpl decorator"),
    "returns_names": ("return [TokenizerInfo", "return ['t'] or [TokenizerInfo", HOOKS, "a list of TokenizerInfo"),
    "bad_name": ('name="e"', 'name="My Executor"', HOOKS, "'My Executor'"),
    "empty": ("@hookimpl\ndef torchchat_", "def _torchchat_", HOOKS, "offers nothing"),
    "heavy": ("from dataclasses", "import numpy\nfrom dataclasses", IMPORTS, "imports numpy"),
    "heavy_hook": ("    return [ExecutorInfo", "    import numpy\n    return [ExecutorInfo", IMPORTS, "imports numpy"),
    "here_only": ("CPU, FP32", "assert 'pytest' in __import__('sys').modules\nCPU, FP32", IMPORTS,
                  "fails in a fresh process: AssertionError"),
    "slow": ("CPU, FP32", "from time import process_time\nend = process_time() + 0.15\n"
             "while process_time() < end: pass\nCPU, FP32", TIME, "ms of CPU time"),
    "no_factory": (':Maker", files', ':Absent", files', FACTORIES, "has no attribute 'Absent'"),
    "needs_path": ("class Maker:", "class Maker:\n    def __init__(self, path): ...", FACTORIES, "raises TypeError"),
    "no_method": ("def load", "def run", FACTORIES, "has no method load()"),
    "no_remove": ("def remove", "def delete", FACTORIES, "has no method remove()"),
    "no_locate": ("def locate", "def find", FACTORIES, "has no method locate()"),
    "kept_of_one": ("def kept(self)", "def kept(self, ref)", FACTORIES, "kept() does not take 0"),
    "few_arguments": ("apply(self, model, options)", "apply(self, model)", FACTORIES, "apply() does not take 2"),
    "no_command": ("generate:generate", "generate:__doc__", FACTORIES, "which is no click command"),
    "bare_field": ('exact: bool = option(False, "slower")', "exact: bool = False", OPTIONS, "'exact' was not declared"),
    "no_help": ('"slower"', '" "', OPTIONS, "'exact' has no help"),
    "bad_default": ("option(0.5", "option(1.5", OPTIONS, "ratio is 1.5; it has to be 0 to 1"),
    "bad_type": ("bool = option(False", "complex = option(1j", OPTIONS, "'exact' is of type complex"),
    "needed_option": ("groupsize: int |", "needed: int\n    groupsize: int |", OPTIONS, "made without arguments"),
    "no_json": ("bool = option(False", "bytes = option(b''", JSON, "cannot be written as JSON"),
    "forgets": ("class Maker:", "_init = Options.__init__\nOptions.__init__ = lambda self, **named: _init(self, "
                "**{**named, 'ratio': 0.25 if named else 0.5})\nclass Maker:", JSON, "come back from JSON as Options("),
    "bad_device": ('"cpu"', '"gpu"', CAPABILITIES, "declares the devices 'gpu'"),
    "bad_dtype": ('"fp32"', '"float32"', CAPABILITIES, "declares the dtypes 'float32'"),
    "bad_scheme": ('{"linear:int8"}', '{"int8"}', CAPABILITIES, "declares the schemes 'int8'"),
    "bad_platform": ('"darwin"', '"macos"', CAPABILITIES, "the platforms 'macos'"),
    "bad_alias": ('"tiny-1B"', '"tiny 1b"', CAPABILITIES, "the aliases 'tiny 1b'"),
    "bad_suffix": ('suffix=".mine"', 'suffix="mine"', CAPABILITIES, "the suffix 'mine'"),
    "text_for_set": ('reads=frozenset({"module"})', 'reads="module"', HOOKS, "reads of executor 'e' is 'module'"),
    "reads_nothing": ('reads=frozenset({"module"}), ', "", CAPABILITIES, "'e' declares no reads"),
    "finds_nothing": ('schemes=frozenset({"mine"}),\n                            formats=frozenset({"mine"}), ', "",
                      CAPABILITIES, "'s' declares no schemes and no formats"),
}


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of them, importable from a folder."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "plugin_right.py").write_text(RIGHT)
    for name, (old, new, *_) in TABLE.items():
        assert old in RIGHT, name
        (folder / f"plugin_{name}.py").write_text(RIGHT.replace(old, new))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


class TestRight(PluginContract):
    plugin = "plugin_right"


def contract(plugin: str) -> type[PluginContract]:
    """The contract of one of the plugins, as a test class of this module."""
    name = f"Contract_{plugin}"
    globals()[name] = type(name, (PluginContract,), {"plugin": f"plugin_{plugin}", "__module__": __name__})
    return globals()[name]


FAULTS = [(contract(name), test, words) for name, (_, _, test, words) in TABLE.items()]


@pytest.mark.parametrize(("contract", "test", "words"), FAULTS)
def test_the_fault_is_found(contract: type, test: str, words: str, failures: Mapping[tuple[str, str], str]) -> None:
    assert words in failures[contract.__name__, test]
    assert "to mend it: " in failures[contract.__name__, test]


def test_every_demand_has_a_fault() -> None:
    assert {name for name in dir(PluginContract) if name.startswith("test_")} == {test for _, test, _ in FAULTS}
