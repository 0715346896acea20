"""The exporter and the executor pass the contracts that every plugin, exporter and executor have to pass."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.testing import ExporterContract, PluginContract
from torchchat_core.testing.models import VARIANTS, seeded

WITHOUT_WINDOWS = tuple(name for name in VARIANTS if not name.startswith("sliding"))


class TestPlugin(PluginContract):
    plugin = "tc_executorch"


class TestEveryArchitecture(ExporterContract):
    plugin, name = "tc_executorch", "executorch"
    variants = WITHOUT_WINDOWS


class QuantisedContract(ExporterContract):
    """Of tiny models with `recipe`: what they mean is what core's layers with integer weights say."""

    plugin, name = "tc_executorch", "executorch"
    variants = ("llama", "tied", "biases", "qk-norm", "interleaved-rope")
    recipe: str

    def model(self, config: ModelConfig) -> Transformer:
        module = seeded(config)
        read_recipe(self.recipe, load_registry(), "cpu", "fp32").apply(module)
        return module

    def export(self, module: Transformer, path: Path) -> None:
        super().export(module, path)

    # These are about files, whatever is in them, or load models of their own, which are not quantised.
    test_the_file_is_where_it_was_asked_for = None
    test_the_file_stands_alone = None
    test_an_existing_file_is_replaced_as_a_whole = None
    test_a_failed_export_leaves_nothing = None
    test_a_failure_at_the_very_end_leaves_nothing = None
    test_closing_a_session_frees_its_memory = None
    test_closing_a_model_frees_its_memory = None


class TestInt8(QuantisedContract):
    recipe = "linear:int8"
    tolerances: ClassVar = {"fp32": 1e-4}


class TestInt4Dynamic(QuantisedContract):
    recipe = "linear:a8w4dq"
    tolerances: ClassVar = {"fp32": 0.02}


class TestInt8Dynamic(QuantisedContract):
    recipe = "linear:a8w8dq"
    tolerances: ClassVar = {"fp32": 0.02}


class TestEmbeddingInt4(QuantisedContract):
    recipe = "embedding:int4"
    tolerances: ClassVar = {"fp32": 1e-4}


class TestEmbeddingInt8(QuantisedContract):
    recipe = "embedding:int8"
    tolerances: ClassVar = {"fp32": 1e-4}


class TestBoth(QuantisedContract):
    recipe = '{"embedding:int8": {"groupsize": 32}, "linear:a8w4dq": {}}'
    tolerances: ClassVar = {"fp32": 0.02}
