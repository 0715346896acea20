"""Every scheme of the support matrix passes the contract of sessions, from files.

Compiling takes some ten seconds a program, so schemes share models: each layer has another one. What the layers mean is
what core's layers with integer weights say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from tc_aoti import SCHEMES
from torchchat_core import kernels
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import replace_layer
from torchchat_core.quantization.rounding import quantise
from torchchat_core.testing import ExporterContract
from torchchat_core.testing.models import seeded

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no compiler")

FORMS: Mapping[str, WeightFormat] = {
    "linear:int4": WeightFormat(bits=4, group_size=32),
    "linear:int8": WeightFormat(bits=8),
    "linear:a8w4dq": WeightFormat(bits=4, group_size=32, activations="int8"),
    "linear:a8w8dq": WeightFormat(bits=8, activations="int8"),
    "embedding:int4": WeightFormat(bits=4, group_size=32),
    "embedding:int8": WeightFormat(bits=8, asymmetric=True),
}


class QuantisedContract(ExporterContract):
    """Of a tiny model whose layers are quantised by `schemes`: parts of their names -> scheme.

    Core's kernels round activations to eight bits: the tolerance is theirs, as for models in memory.
    """

    plugin = "tc_aoti"
    schemes: Mapping[str, str]
    dtypes: frozenset[str]
    tolerances: ClassVar = {"fp32": 0.08, "bf16": 0.1, "fp16": 0.08}

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cpu"}), self.dtypes

    def model(self, config: ModelConfig) -> Transformer:
        module = seeded(config)
        weights = [name.removesuffix(".weight") for name, tensor in module.named_parameters() if tensor.dim() == 2]
        for name in weights:
            scheme = next(scheme for part, scheme in self.schemes.items() if part in name)
            weight = module.get_submodule(name).get_parameter("weight")
            replace_layer(module, name, scheme, quantise(weight, FORMS[scheme]))
        return module

    # These are about files, whatever is in them, or load models of their own, which are not quantised.
    test_the_file_is_where_it_was_asked_for: Any = None
    test_the_file_stands_alone: Any = None
    test_an_existing_file_is_replaced_as_a_whole: Any = None
    test_a_failed_export_leaves_nothing: Any = None
    test_a_failure_at_the_very_end_leaves_nothing: Any = None
    test_closing_a_session_frees_its_memory: Any = None
    test_closing_a_model_frees_its_memory: Any = None


class TestWithFloatActivations(QuantisedContract):
    name, variants = "aoti-package", ("llama",)
    schemes: ClassVar = {"embed_tokens": "embedding:int8", "layers.0": "linear:int4", "layers.1": "linear:int8",
                         "lm_head": "linear:int8"}
    dtypes = frozenset({"bf16", "fp16"})


class TestWithRoundedActivations(QuantisedContract):
    name, variants = "aoti-dso", ("biases",)
    schemes: ClassVar = {"embed_tokens": "embedding:int4", "layers.0": "linear:a8w4dq", "layers.1": "linear:a8w8dq",
                         "lm_head": "linear:a8w8dq"}
    dtypes = frozenset({"fp32", "bf16"})


def test_no_scheme_is_forgotten() -> None:
    tested = {*TestWithFloatActivations.schemes.values(), *TestWithRoundedActivations.schemes.values()}
    assert tested == FORMS.keys() == SCHEMES
