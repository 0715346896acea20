"""The quantizers pass the contracts that every plugin and every quantizer have to pass."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from torchchat_core.testing import PluginContract, QuantizerContract


class TestPlugin(PluginContract):
    plugin = "tc_quant_int4"


# Four bits leave an error of about a tenth in random weights, which the layers of a random model add up.


class TestInt4(QuantizerContract):
    plugin, name = "tc_quant_int4", "int4"
    recipes = ({}, {"groupsize": 32, "asymmetric": True}, {"groupsize": 64}, {"groupsize": 128},
               {"method": "gptq", "asymmetric": True, "groupsize": 64})
    error_bound = 0.45


class TestInt4Dynamic(QuantizerContract):
    plugin, name = "tc_quant_int4", "a8w4dq"
    recipes = ({}, {"groupsize": 128}, {"method": "gptq"})
    error_bound = 0.45


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
class TestInt4ByHqq(QuantizerContract):
    plugin, name = "tc_quant_int4", "int4"
    recipes = ({"method": "hqq"}, {"method": "hqq", "asymmetric": True})
    error_bound = 0.45

    # No text: `TestInt4` has the recipe that looks at one.
    test_a_text_is_asked_for_where_it_is_needed = None
    test_the_text_has_a_say = None


class TestInt4Embedding(QuantizerContract):
    plugin, name = "tc_quant_int4", "embedding-int4"
    recipes = ({}, {"groupsize": 0})
    error_bound = 0.45
