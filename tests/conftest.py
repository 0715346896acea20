"""What several tests need: the test data, and tiny models made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer

TESTDATA = Path(__file__).resolve().parents[2] / "shared" / "testdata"


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real models and golden results, which is not part of the repository."""
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    return TESTDATA


def tiny_config(**changes: object) -> ModelConfig:
    """A model of some ten thousand parameters."""
    sizes = {"architecture": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
             "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_context": 128}
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def seeded(config: ModelConfig, seed: int = 0) -> Transformer:
    """A transformer with random weights that are the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model


@pytest.fixture
def make_transformer() -> Callable[..., Transformer]:
    """Makes a seeded tiny transformer; keyword arguments change its configuration."""
    return lambda seed=0, **changes: seeded(tiny_config(**changes), seed)
