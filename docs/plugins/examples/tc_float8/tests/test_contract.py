from torchchat_core.testing import PluginContract, QuantizerContract


class TestPlugin(PluginContract):
    plugin = "tc_float8"


class TestQuantizer(QuantizerContract):
    plugin, name = "tc_float8", "float8"
    recipes = ({}, {"output_layer": True})
    error_bound = 0.15  # of the logits of a tiny model with random weights
