"""Executors give for quantised models what those models mean, for every scheme that they declare."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from torchchat_core import kernels
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.specs import ExecutorInfo, QuantizerInfo
from torchchat_core.support import IN_MEMORY, Combination, refusal
from torchchat_core.testing import ExecutorContract
from torchchat_core.testing.models import seeded

pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
pytest.importorskip("tc_quant_int8", reason="tc-quant-int8 is not installed")


class QuantisedContract(ExecutorContract):
    """Of a tiny model with `recipe`. Core's kernels round activations to eight bits: the tolerance is theirs."""

    variants = ("llama",)
    tolerances: ClassVar = {"fp32": 0.08}
    recipe: str

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"cpu"}), frozenset({"fp32"})

    def model(self, config: ModelConfig) -> Transformer:
        module = seeded(config)
        read_recipe(self.recipe, load_registry(), "cpu", "fp32").apply(module)
        return module

    # These load models of their own, which are not quantised.
    test_closing_a_session_frees_its_memory = None
    test_closing_a_model_frees_its_memory = None


class EagerContract(QuantisedContract):
    plugin, name = "tc_eager", "eager"


class TestInt4(EagerContract):
    recipe = "linear:int4"


class TestInt4WithCentres(EagerContract):
    recipe = '{"linear:int4": {"asymmetric": true}}'


class TestInt4Dynamic(EagerContract):
    recipe = "linear:a8w4dq"


class TestInt8(EagerContract):
    recipe = "linear:int8"


class TestInt8Dynamic(EagerContract):
    recipe = "linear:a8w8dq"


class TestEmbeddingInt4(EagerContract):
    recipe = "embedding:int4"


class TestEmbeddingInt8(EagerContract):
    recipe = "embedding:int8"


class CompileContract(QuantisedContract):
    """Compiling takes seconds for each kind of decoder layer: all linear schemes are in one kind."""

    plugin, name = "tc_compile", "compile"
    linear: ClassVar = {"linear:int4": {"layers": ["*.q_proj", "*.k_proj"]},
                        "linear:int8": {"layers": ["*.v_proj", "*.down_proj"]},
                        "linear:a8w4dq": {"layers": ["*.o_proj", "lm_head"]},
                        "linear:a8w8dq": {"layers": ["*.gate_proj", "*.up_proj"]}}


@pytest.mark.skipif(not kernels.available(), reason="there is no compiler")
class TestCompiledWithInt4Embedding(CompileContract):
    recipe = json.dumps({**CompileContract.linear, "embedding:int4": {}})


@pytest.mark.skipif(not kernels.available(), reason="there is no compiler")
class TestCompiledWithInt8Embedding(CompileContract):
    recipe = json.dumps({**CompileContract.linear, "embedding:int8": {}})


def test_every_scheme_that_the_matrix_allows_is_tested() -> None:
    registry = load_registry()
    contracts = [each for each in globals().values() if isinstance(each, type) and hasattr(each, "recipe")]
    tested = {(each.name, scheme) for each in contracts
              for scheme in read_recipe(each.recipe, registry, "cpu", "fp32").schemes}
    wanted = {(executor.name, quantizer.scheme) for executor in registry.infos(ExecutorInfo)
              for quantizer in registry.infos(QuantizerInfo) if IN_MEMORY in executor.reads
              and executor.name in ("eager", "compile") and refusal(Combination(
                  executor=executor.name, device="cpu", dtype="fp32", scheme=quantizer.scheme),
                  registry) is None}
    assert tested == wanted
