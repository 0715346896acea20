"""The built-in sources, and the built-ins as a plugin, pass the contracts that every plugin has to pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import save_file

from torchchat_core.testing import ModelSourceContract, PluginContract
from torchchat_core.testing.models import TINY, seeded, tiny_config

CONFIG = {"model_type": "llama", "vocab_size": TINY["vocab_size"], "hidden_size": TINY["hidden_size"],
          "intermediate_size": TINY["intermediate_size"], "num_hidden_layers": TINY["num_layers"],
          "num_attention_heads": TINY["num_heads"], "num_key_value_heads": TINY["num_kv_heads"],
          "max_position_embeddings": TINY["max_context"]}


class TestBuiltins(PluginContract):
    plugin = "torchchat_core.builtins"


class TestLocal(ModelSourceContract):
    plugin, name = "torchchat_core.builtins", "local"

    @pytest.fixture
    def references(self, tmp_path: Path) -> Sequence[str]:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        save_file(seeded(tiny_config()).state_dict(), folder / "model.safetensors")
        return [str(folder)]


class TestEmbedded(ModelSourceContract):
    plugin, name = "torchchat_core.builtins", "embedded"

    @pytest.fixture
    def references(self) -> Sequence[str]:
        return ["embedded"]
