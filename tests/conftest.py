"""What several tests need: the test data, and tiny models made on the spot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.text_format import TextFormat

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


class ByteTokenizer:
    """Every byte a token (ids 3 to 258), with <s>, </s> and <|turn|> before them."""

    vocab_size = 259
    bos_id = 0
    eos_id = 1
    special_tokens: Mapping[str, int] = {"<s>": 0, "</s>": 1, "<|turn|>": 2}
    adds_bos = True
    adds_prefix_space = False

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not special:
            return [byte + 3 for byte in text.encode()]
        parts = re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", text)
        return [token for part in parts for token in
                ([self.special_tokens[part]] if part in self.special_tokens else self.encode(part))]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 3]) if token > 2 else b"<s>"


TURNS = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}</s>{% endfor %}" \
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"


@pytest.fixture
def byte_format() -> TextFormat:
    """Text as bytes, with a chat template."""
    template = ChatTemplate(TURNS, bos_token="<s>", eos_token="</s>")
    return TextFormat(ByteTokenizer(), template, frozenset({1}), {})


class ScriptedSession:
    """A session without a model: says `script` token by token, and keeps count of what it is given."""

    def __init__(self, script: Sequence[int], limit: int = 4096) -> None:
        self.limit = limit
        self.length = 0
        self.prefilled: list[int] = []  # sizes of prefills
        self._script = list(script)
        self._said = 0

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        self.prefilled.append(len(tokens))
        self.length += len(tokens)
        return self._next()

    def decode(self, token: int) -> torch.Tensor:
        self.length += 1
        return self._next()

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def close(self) -> None:
        self.length = 0

    def _next(self) -> torch.Tensor:
        logits = torch.zeros(ByteTokenizer.vocab_size)
        logits[self._script[self._said % len(self._script)]] = 10.0
        self._said += 1
        return logits


@pytest.fixture
def scripted() -> Callable[..., ScriptedSession]:
    """Makes a session that says a text, then </s>, again and again."""
    return lambda text, limit=4096: ScriptedSession([*ByteTokenizer().encode(text), 1], limit)
