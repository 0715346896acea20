"""The reference executor passes the contracts that every plugin and every executor have to pass."""

from __future__ import annotations

from torchchat_core.testing import ExecutorContract, PluginContract


class TestPlugin(PluginContract):
    plugin = "tc_eager"


class TestEager(ExecutorContract):
    plugin, name = "tc_eager", "eager"
