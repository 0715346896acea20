"""The quantizers pass the contracts that every plugin and every quantizer have to pass."""

from __future__ import annotations

from torchchat_core.testing import PluginContract, QuantizerContract


class TestPlugin(PluginContract):
    plugin = "tc_quant_int8"


class TestInt8(QuantizerContract):
    plugin, name = "tc_quant_int8", "int8"
    recipes = ({}, {"groupsize": 32}, {"groupsize": 128})
    error_bound = 0.04


class TestInt8Dynamic(QuantizerContract):
    plugin, name = "tc_quant_int8", "a8w8dq"
    error_bound = 0.06


class TestInt8Embedding(QuantizerContract):
    plugin, name = "tc_quant_int8", "embedding-int8"
    recipes = ({}, {"groupsize": 32})
    error_bound = 0.04
