"""Executors give on a GPU what quantised models mean, with every product that is chosen there.

Activations that are rounded, and a model in half precision, may differ by a step of what they are rounded to.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.testing import ExecutorContract
from torchchat_core.testing.models import seeded

pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
pytest.importorskip("tc_quant_int8", reason="tc-quant-int8 is not installed")

WIDE_ENOUGH = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}  # for tinygemm's tiles


class CudaContract(ExecutorContract):
    """Of a small model with `recipe`."""

    plugin, name = "tc_eager", "eager"
    variants = ("llama",)
    tolerances: ClassVar = {"fp32": 0.05, "bf16": 0.08, "fp16": 0.05}
    recipe: str

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cuda"}), frozenset({"fp32", "bf16", "fp16"})

    def model(self, config: ModelConfig) -> Transformer:
        module = seeded(dataclasses.replace(config, **WIDE_ENOUGH))
        read_recipe(self.recipe, load_registry(), "cuda", "bf16").apply(module)
        return module

    # These load models of their own, which are not quantised.
    test_closing_a_session_frees_its_memory = None
    test_closing_a_model_frees_its_memory = None


class TestInt4(CudaContract):
    recipe = '{"linear:int4": {"groupsize": 128}}'


class TestInt4WithCentres(CudaContract):
    recipe = '{"linear:int4": {"groupsize": 32, "asymmetric": true}}'


class TestInt4Dynamic(CudaContract):
    recipe = "linear:a8w4dq"


class TestInt8(CudaContract):
    recipe = '{"linear:int8": {}, "embedding:int8": {}}'


class TestInt8InGroups(CudaContract):
    recipe = '{"linear:int8": {"groupsize": 32}, "embedding:int4": {}}'


class TestInt8Dynamic(CudaContract):
    recipe = "linear:a8w8dq"


class CompiledContract(CudaContract):
    """Compiling takes a quarter of a minute for each model: all products are in one."""

    plugin, name = "tc_compile", "compile"

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cuda"}), frozenset({"bf16"})


class TestCompiled(CompiledContract):
    recipe = ('{"linear:int4": {"layers": ["*.q_proj", "*.k_proj"], "groupsize": 64}, '
              '"linear:int8": {"layers": ["*.v_proj", "*.down_proj"]}, '
              '"linear:a8w4dq": {"layers": ["*.o_proj", "lm_head"]}, '
              '"linear:a8w8dq": {"layers": ["*.gate_proj", "*.up_proj"]}, "embedding:int8": {}}')


class TestCompiledInHalfPrecision(CompiledContract):
    recipe = '{"linear:int8": {}}'

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cuda"}), frozenset({"fp16"})
