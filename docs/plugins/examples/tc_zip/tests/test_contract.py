import json
import zipfile
from contextlib import contextmanager

import pytest
from safetensors.torch import save

from torchchat_core.testing import ModelSourceContract, PluginContract

CONFIG = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


class TestPlugin(PluginContract):
    plugin = "tc_zip"


class TestSource(ModelSourceContract):
    plugin, name = "tc_zip", "zip"

    @pytest.fixture
    def references(self, tmp_path, monkeypatch, make_tiny_model):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.fetched, self.cut, extract = 0, False, zipfile.ZipFile.extract

        def counted(archive, member, folder):
            if self.cut and member.filename == "config.json":
                raise OSError("cut off")
            self.fetched += member.file_size
            return extract(archive, member, folder)

        monkeypatch.setattr(zipfile.ZipFile, "extract", counted)
        for seed in (0, 1):
            with zipfile.ZipFile(tmp_path / f"{seed}.zip", "w") as archive:
                archive.writestr("model.safetensors", save(dict(make_tiny_model(seed).state_dict())))
                archive.writestr("config.json", json.dumps(CONFIG))
        return [f"zip:{tmp_path}/{seed}.zip" for seed in (0, 1)]

    def bytes_fetched(self):
        return self.fetched

    @contextmanager
    def interruption(self):
        self.cut = True
        yield
        self.cut = False
