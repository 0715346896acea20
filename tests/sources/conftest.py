"""A hub on this machine, tiny models to put there, and caches of its own for every test."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save

from torchchat_core.sources import downloading
from torchchat_core.testing.models import TINY, seeded, tiny_config

CONFIG = {"model_type": "llama", "vocab_size": TINY["vocab_size"], "hidden_size": TINY["hidden_size"],
          "intermediate_size": TINY["intermediate_size"], "num_hidden_layers": TINY["num_layers"],
          "num_attention_heads": TINY["num_heads"], "num_key_value_heads": TINY["num_kv_heads"],
          "max_position_embeddings": TINY["max_context"]}
METAS_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
               "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj":
               "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
               "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3", "input_layernorm":
               "attention_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "layers"}


def _module_beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


hub_server = _module_beside("hub_server")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A `hub_server.FakeHub` that HF_ENDPOINT names; caches below tmp_path; no waiting between attempts."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME",
                 "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))  # nor that of a login
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(downloading, "PAUSE", 0.01)
    with hub_server.running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def repository() -> Callable[..., Any]:
    """Makes a `hub_server.Repository` of files by path."""
    return lambda files, **more: hub_server.Repository(files, **more)


def model_files(seed: int = 0) -> dict[str, bytes]:
    """Of a tiny model in Hugging Face's layout, with the tokenizer of the embedded one."""
    embedded = Path(downloading.__file__).parent.parent / "data" / "embedded"
    weights = seeded(tiny_config(vocab_size=VOCABULARY), seed).state_dict()
    return {
        "README.md": b"# A model\n",
        "config.json": json.dumps({**CONFIG, "vocab_size": VOCABULARY}).encode(),
        "tokenizer.json": (embedded / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": (embedded / "tokenizer_config.json").read_bytes(),
        "model.safetensors": save({name: tensor.contiguous() for name, tensor in weights.items()}),
    }


def _vocabulary() -> int:
    embedded = Path(downloading.__file__).parent.parent / "data" / "embedded"
    return int(json.loads((embedded / "config.json").read_text())["vocab_size"])


VOCABULARY = _vocabulary()


@pytest.fixture(scope="session")
def tiny_files() -> Callable[[int], dict[str, bytes]]:
    """Files of tiny models that can be run, by seed."""
    made = functools.cache(model_files)
    return lambda seed: dict(made(seed))


@pytest.fixture(scope="session")
def llama2c_file() -> Callable[[int], bytes]:
    """A tiny model in one file, as llama2.c keeps them, by seed."""

    @functools.cache
    def make(seed: int) -> bytes:
        state = {}
        for name, tensor in seeded(tiny_config(), seed).state_dict().items():
            for ours, metas in METAS_NAMES.items():
                name = name.replace(ours, metas)
            state[name] = tensor
        arguments = {"dim": TINY["hidden_size"], "n_layers": TINY["num_layers"], "n_heads": TINY["num_heads"],
                     "n_kv_heads": TINY["num_kv_heads"], "vocab_size": TINY["vocab_size"],
                     "multiple_of": 16, "max_seq_len": TINY["max_context"]}
        buffer = io.BytesIO()
        torch.save({"model": state, "model_args": arguments}, buffer)
        return buffer.getvalue()

    return make
