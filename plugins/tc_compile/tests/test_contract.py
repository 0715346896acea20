"""The compiling executor passes the contracts that every plugin and every executor have to pass."""

from __future__ import annotations

import pytest

from torchchat_core import kernels
from torchchat_core.testing import ExecutorContract, PluginContract

compiles = pytest.mark.skipif(not kernels.available(), reason="there is no compiler: tc-eager's tests are the same")


class TestPlugin(PluginContract):
    plugin = "tc_compile"


class OfSomeDtypes(ExecutorContract):
    """Each kind of layer takes some seconds to compile in each dtype: not all of them are worth it."""

    plugin, name = "tc_compile", "compile"
    dtypes: frozenset[str]

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cpu"}), self.dtypes


@compiles
class TestEveryArchitecture(OfSomeDtypes):
    dtypes = frozenset({"fp32"})


@compiles
class TestHalfPrecision(OfSomeDtypes):
    variants = ("sliding-layers",)
    dtypes = frozenset({"bf16", "fp16"})


class TestOnCuda(OfSomeDtypes):
    """With recorded graphs."""

    variants = ("llama", "sliding-layers", "longrope")

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cuda"}), frozenset({"fp32", "bf16"})
