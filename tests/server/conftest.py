"""A server in this process: a tiny model with a chat template, and one of the real small models."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import load_registry
from torchchat_core.server.app import ServerOptions, make_app
from torchchat_core.server.limits import Limits
from torchchat_core.testing.models import seeded, tiny_config

CONTROL = ["<s>", "</s>", "<|turn|>"]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }} <tool_call>{% endif %}{% for m in messages %}<|turn|>"
    "{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights whose tokens are bytes, with a template in Hermes' form of tools."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*CONTROL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = tiny_config(vocab_size=len(vocabulary), max_context=1024)
    module = seeded(config)
    save_file({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "max_position_embeddings": 1024, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}))
    return folder


def saying_model(folder: Path, added: Sequence[tuple[str, bool]], chain: Sequence[Sequence[str]], template: str,
                 end: str) -> Path:
    """Write a model whose next token depends on the last one alone.

    `added`: texts of tokens, and whether they are control tokens; `chain`: each token is followed by the next one of
    its row. All bytes are tokens too.
    """
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for text, special in added:
        token = AddedToken(text, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(folder / "tokenizer.json"))
    size, hidden = tokenizer.get_vocab_size(), 128
    table = torch.randn(size, hidden, generator=torch.Generator().manual_seed(0))
    head = torch.zeros(size, hidden)
    for row in chain:
        ids = [tokenizer.token_to_id(text) for text in row]
        assert None not in ids, row
        for before, after in itertools.pairwise(ids):
            head[after] += table[before] / table[before].norm() * 10
    prefix, zeros = "model.layers.0.", torch.zeros
    weights = {"model.embed_tokens.weight": table, "lm_head.weight": head, "model.norm.weight": torch.ones(hidden)}
    weights |= {f"{prefix}self_attn.{name}_proj.weight": zeros(hidden, hidden) for name in "qkvo"}
    weights |= {f"{prefix}mlp.{name}_proj.weight": zeros(32, hidden) for name in ("gate", "up")}
    weights[f"{prefix}mlp.down_proj.weight"] = zeros(hidden, 32)
    weights |= {f"{prefix}{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": size, "hidden_size": hidden, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32",
        "eos_token_id": tokenizer.token_to_id(end)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": added[0][0], "eos_token": end, "add_bos_token": False, "chat_template": template}))
    return folder


@pytest.fixture
def saying(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Start a server with a scripted model "m": `saying(added, chain, template, end)` returns a client."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(served({"m": saying_model(tmp_path / "m", *arguments)}))


@contextmanager
def served(models: dict[str, Path | str], api_key: str | None = None, local: bool = False,
           origins: Sequence[str] = (), **limits: Any) -> Iterator[TestClient]:
    """A client of a server in this process, on threads of which each computes alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    requests = {name: ModelRequest(model=str(path)) for name, path in models.items()}
    options = ServerOptions(models=requests, limits=Limits(**limits), api_key=api_key, local=local, origins=origins)
    app = make_app(options, load_registry())
    try:
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """`start(folder, *arguments)`: a server in a process of its own on a free port, and its address."""
    processes: list[subprocess.Popen[str]] = []

    def started(folder: Path, *arguments: object) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "torchchat_core", "server", str(folder), "--port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes.append(process)
        line = process.stderr.readline()  # type: ignore[union-attr]
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        return process, found[0]

    yield started
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """`with serve({"name": path}, **limits) as client`"""
    return served


@pytest.fixture(scope="package")
def client(chat_model: Path) -> Iterator[TestClient]:
    """The tiny model, as "tiny"."""
    with served({"tiny": chat_model}) as found:
        yield found


@pytest.fixture(scope="package")
def stories(testdata: Path) -> Iterator[TestClient]:
    """A real small model, as "stories"."""
    with served({"stories": testdata / "hf" / "stories260K"}) as found:
        yield found
