"""The fixtures for the tests of plugins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from torchchat_core import testing
from torchchat_core.models.transformer import Transformer
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.specs import CommandInfo, ExecutorInfo
from torchchat_core.testing.models import (
    GOLDEN_COUNT,
    PROMPTS,
    VARIANTS,
    greedy_tokens,
    reference_logits,
    seeded,
    variant_config,
)

PLUGIN = '''
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ExecutorInfo

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name="made", summary="made", factory="nowhere:Nothing")]
'''


def test_tiny_llama_is_the_same_in_every_run(tiny_llama: Transformer, make_tiny_model: Callable[..., Transformer],
                                             golden_tokens: Mapping[tuple[int, ...], list[int]]) -> None:
    for name, tensor in make_tiny_model().state_dict().items():
        assert torch.equal(tensor, tiny_llama.state_dict()[name])
    assert greedy_tokens(tiny_llama, PROMPTS[1], GOLDEN_COUNT) == golden_tokens[PROMPTS[1]]
    assert {len(tokens) for tokens in golden_tokens.values()} == {GOLDEN_COUNT}


def test_other_tiny_models_have_the_changes(make_tiny_model: Callable[..., Transformer]) -> None:
    model = make_tiny_model(seed=3, tied_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_variants_differ_in_what_they_compute() -> None:
    """Otherwise a runtime that overlooks one of the variations would pass."""
    logits = {}
    for variant in VARIANTS:
        if VARIANTS[variant].get("vocab_size") is None:
            logits[variant] = reference_logits(seeded(variant_config(variant)), PROMPTS[2])[-1]
    for one in logits:
        for other in logits:
            assert one == other or float((logits[one] - logits[other]).abs().max()) > 0.01, (one, other)


def test_the_isolated_registry_has_core_alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("TORCHCHAT_STRICT_PLUGINS", "1")
    registry: Registry = request.getfixturevalue("isolated_registry")
    assert [row.distribution for row in registry.plugins] == ["torchchat-core"]
    assert registry.infos(ExecutorInfo) == []
    assert registry.infos(CommandInfo)
    assert "TORCHCHAT_STRICT_PLUGINS" not in os.environ


def test_a_made_plugin_is_found_as_an_installed_one(make_plugin: Callable[..., Any]) -> None:
    made = make_plugin(PLUGIN, distribution="tc-made", version="2.0")
    row = next(row for row in load_registry().plugins if row.distribution == "tc-made")
    assert (row.name, row.version, row.state) == ("tc_made", "2.0", "loaded")
    assert made.module.torchchat_executors()[0].name == "made"


def test_a_made_plugin_is_gone_after_its_test() -> None:
    """The one of the test before."""
    assert "tc_made" not in sys.modules
    assert not any(row.distribution == "tc-made" for row in load_registry().plugins)


def test_several_and_broken_plugins_can_be_made(make_plugin: Callable[..., Any]) -> None:
    make_plugin(PLUGIN, distribution="tc-made")
    make_plugin("raise RuntimeError('no luck')", distribution="tc-broken")
    rows = {row.distribution: row for row in load_registry().plugins}
    assert rows["tc-made"].state == "loaded"
    assert rows["tc-broken"].reason == "RuntimeError: no luck"


def test_the_pytest_plugin_imports_nothing_heavy() -> None:
    """Every pytest in an environment with torchchat loads it."""
    code = ("import sys; import torchchat_core.testing.pytest_plugin; "
            "print(sorted({'torch', 'click', 'numpy', 'tokenizers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_contract_can_be_imported_from_the_package() -> None:
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Contract'"):
        testing.Contract  # noqa: B018
