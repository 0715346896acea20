"""Both forms of file, and what runs them, pass the contracts that every plugin, exporter and executor have to pass."""

from __future__ import annotations

import pytest

from torchchat_core import kernels
from torchchat_core.testing import ExporterContract, PluginContract

compiles = pytest.mark.skipif(not kernels.available(), reason="there is no compiler")


class TestPlugin(PluginContract):
    plugin = "tc_aoti"


class OfSomeDtypes(ExporterContract):
    """A program takes some ten seconds to compile for each kind of model, and is kept: not all of them are worth it."""

    plugin = "tc_aoti"
    dtypes: frozenset[str]

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cpu"}), self.dtypes


@compiles
class TestLibrary(OfSomeDtypes):
    name = "aoti-dso"
    variants = ("sliding-layers",)
    dtypes = frozenset({"fp32"})


@compiles
class TestPackage(OfSomeDtypes):
    name = "aoti-package"
    variants = ("longrope",)
    dtypes = frozenset({"bf16"})
