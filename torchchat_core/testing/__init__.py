"""The kit with which the author of a plugin finds out whether it is right.

A test file of the plugin subclasses the contracts that concern it, sets a few attributes or fixtures, and inherits
every test:

    from torchchat_core.testing import ExecutorContract, PluginContract

    class TestPlugin(PluginContract):
        plugin = "my_plugin"

    class TestExecutor(ExecutorContract):
        plugin, name = "my_plugin", "mine"

A test that fails says what is wrong and how it is mended. `pytest_plugin` has fixtures for tests of one's own, and
`models` the tiny models that the contracts use. Needs pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchchat_core.testing.executor_contract import ExecutorContract
    from torchchat_core.testing.exporter_contract import ExporterContract
    from torchchat_core.testing.plugin_contract import PluginContract
    from torchchat_core.testing.quantizer_contract import QuantizerContract
    from torchchat_core.testing.source_contract import ModelSourceContract
    from torchchat_core.testing.tokenizer_contract import TokenizerContract

__all__ = ["ExecutorContract", "ExporterContract", "ModelSourceContract", "PluginContract", "QuantizerContract",
           "TokenizerContract"]

_MODULES = {"ModelSourceContract": "source_contract"}


def __getattr__(name: str) -> Any:
    """Imports a contract when it is first used: pytest imports this package on every start, for the fixtures."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, name.removesuffix("Contract").lower() + "_contract")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
