"""The decoder-only transformer, once, for every architecture that torchchat knows.

The module holds weights and no state. Tokens come as one flat row, whichever sequences they belong to; what they
attend to is the business of the `Attend` callable that is passed in, so that the same module serves a growing
cache, several sequences in one step, training, and graphs whose cache is an input.

Parameter names are those of Hugging Face's Llama family, so that the commonest checkpoints load without renaming.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rotary import RotaryEmbedding, apply_rotary


class Attend(Protocol):
    """Softmax attention of one layer, with whatever memory of earlier tokens the caller keeps."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, heads, head_dim], key and value [n, kv_heads, head_dim] -> context [n, heads * head_dim]."""


class Transformer(nn.Module):
    """Token ids in, logits out.

    `forward(tokens [n], positions [n], attend)` -> logits [n, vocab]; with `rows` [m], only those rows: [m, vocab].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None, extended: int = 0
    ) -> Tensor:
        hidden = self.model(tokens, positions, attend, extended)  # [n, hidden]
        if rows is not None:
            hidden = hidden[rows]
        logits: Tensor = self.lm_head(hidden)
        return logits if self.config.logits_divisor == 1.0 else logits / self.config.logits_divisor


class Decoder(nn.Module):
    """Embedding, layers and the last norm: tokens [n] -> hidden states [n, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_multiplier = config.embedding_multiplier
        self.rotary = RotaryEmbedding(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, extended: int) -> Tensor:
        cos, sin = self.rotary(positions, extended)
        hidden: Tensor = self.embed_tokens(tokens)  # [n, hidden]
        if self.embedding_multiplier != 1.0:
            hidden = hidden * self.embedding_multiplier
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attend)
        normed: Tensor = self.norm(hidden)
        return normed


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual: [n, hidden] -> [n, hidden]."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        hidden = self.add(hidden, self.self_attn(self.input_layernorm(hidden), cos, sin, attend))
        return self.add(hidden, self.mlp(self.post_attention_layernorm(hidden)))

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        return hidden + update if self.residual_multiplier == 1.0 else hidden + update * self.residual_multiplier


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional biases and query-key norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.rope_interleaved = config.rope_interleaved
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size,
                                bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.qkv: nn.Module | None = None  # the first three projections in one product, where an executor has that

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        query, key, value = self.project(hidden) if self.qkv is None else self.qkv(hidden)
        query = query.view(-1, self.num_heads, self.head_dim)  # [n, heads, head_dim]
        key = key.view(-1, self.num_kv_heads, self.head_dim)  # [n, kv_heads, head_dim]
        value = value.view(-1, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = apply_rotary(query, cos, sin, self.rope_interleaved)
        key = apply_rotary(key, cos, sin, self.rope_interleaved)
        output: Tensor = self.o_proj(attend(self.index, query, key, value))
        return output

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [n, hidden] -> queries, keys, values, each [n, heads * head_dim]."""
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gate_up: nn.Module | None = None  # the first two in one product, where an executor has that

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = (self.gate_proj(hidden), self.up_proj(hidden)) if self.gate_up is None else self.gate_up(hidden)
        output: Tensor = self.down_proj(F.silu(gate) * up)
        return output


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
