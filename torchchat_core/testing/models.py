"""Tiny models with seeded weights, a tokenizer without files, and the computation that others are compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchchat_core.models.attention import RowAttention
from torchchat_core.models.config import ModelConfig, RopeScaling
from torchchat_core.models.transformer import Transformer
from torchchat_core.tokenizers.base import well_formed

TINY: Mapping[str, Any] = {
    "architecture": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_context": 128,
}

# One for each way in which the architectures differ: name -> changes of `TINY`.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "multi-head": {"num_kv_heads": 4},
    "multi-query": {"num_kv_heads": 1},
    "tied": {"tied_embeddings": True},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "qk-norm": {"qk_norm": True},
    "sliding-window": {"sliding_window": 6},
    "sliding-layers": {"sliding_window": 6, "sliding_layers": (True, False)},
    "interleaved-rope": {"rope_interleaved": True},
    "scaled-rope": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=16)},
    "longrope": {"rope_scaling": RopeScaling(kind="longrope", factor=4.0, original_context=16,
                                             short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0))},
    "multipliers": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
                    "logits_divisor": 2.0},
    "odd-sizes": {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 50, "head_dim": 10},
}

PROMPTS: Sequence[tuple[int, ...]] = ((1,), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5), tuple(range(40, 70)))
GOLDEN_COUNT = 16  # tokens that follow each of the prompts


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of some ten thousand parameters: `TINY` with changes."""
    return ModelConfig(**{**TINY, **changes})


def variant_config(variant: str) -> ModelConfig:
    """The configuration of one of `VARIANTS`."""
    return tiny_config(**VARIANTS[variant])


def seeded(config: ModelConfig, seed: int = 0) -> Transformer:
    """A float32 transformer on the CPU with random weights that are the same in every run.

    Their size keeps what goes through the layers near 1, so that rounding errors do not grow as they go.
    """
    generator, scale = torch.Generator().manual_seed(seed), config.hidden_size**-0.5
    model = Transformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else scale * noise)
    return model


@torch.inference_mode()
def reference_logits(model: Transformer, tokens: Sequence[int], limit: int | None = None) -> Tensor:
    """Logits [n, vocab] of whole sequences, computed without a cache: what every runtime has to agree with.

    `limit` is the length that the sequence may reach, on which longrope depends; None: the model's own.
    """
    extended = model.model.rotary.extension(model.config.max_context if limit is None else limit, len(tokens))
    device = model.model.norm.weight.device
    logits: Tensor = model(torch.tensor(tokens, device=device), torch.arange(len(tokens), device=device),
                           RowAttention(model.config, rows=1), extended=extended)
    return logits


def greedy_tokens(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest tokens one after the other, by the reference computation."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt):]


class TinyTokenizer:
    """A `specs.Tokenizer` without files: every byte is a token (ids 3 to 258), control tokens stand before them."""

    vocab_size = 259
    bos_id: int | None = 0
    eos_id: int | None = 1
    special_tokens: Mapping[str, int] = {"<s>": 0, "</s>": 1, "<|turn|>": 2}
    adds_bos = True
    adds_prefix_space = False
    end_ids: frozenset[int] = frozenset()
    chat_template: str | Sequence[Mapping[str, str]] | None = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        controls = self.special_tokens if special else {}
        parts = re.split("(" + "|".join(map(re.escape, controls)) + ")", text) if controls else [text]
        return [token for part in parts for token in
                ([controls[part]] if part in controls else (byte + 3 for byte in well_formed(part).encode()))]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 3]) if token > 2 else list(self.special_tokens)[token].encode()
