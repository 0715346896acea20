"""Tokens of one sequence, or of several, from embedding to logits in a single call: core's C++ `Decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from torchchat_core.kernels.layers import DenseLinear, KernelNorm
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import FIRST_CAPACITY, KVCache
from torchchat_core.models.rotary import RotaryEmbedding
from torchchat_core.models.transformer import Attention, DecoderLayer, FeedForward, RMSNorm, Transformer
from torchchat_core.quantization.running import PanelLinear


class TokenDecoder:
    """Decodes as `Transformer` does, one token of each sequence at a time. It shares the weights."""

    def __init__(self, parts: DecoderParts, embedding: nn.Module, rotary: RotaryEmbedding, config: ModelConfig) -> None:
        """`kernels.load` has to have succeeded. Raises `RuntimeError` where the parts do not belong together."""
        self._decoder = torch.classes.torchchat.Decoder(config.hidden_size, parts.tensors, parts.numbers, parts.scalars)
        self._embedding, self._multiplier = embedding, config.embedding_multiplier
        self._angles = RotaryTable(rotary, config.max_context)

    @classmethod
    def of(cls, module: Transformer) -> TokenDecoder:
        """The decoder of a module of which `decodes` is true."""
        return cls(decoder_parts(module), module.model.embed_tokens, module.model.rotary, module.config)

    def logits(self, token: int, cache: KVCache, extended: bool) -> Tensor:
        """Of the token behind those that the cache holds, which gets its keys and values: float32 [1, vocab].

        Raises `TorchchatError` where the cache is full; `cache.advance` is left to the caller.
        """
        keys, values = cache.all_rooms(1)
        cos, sin = self._angles.at(cache.length, extended)
        logits: Tensor = self._decoder.run(self._embedded(token), cos, sin, keys, values, cache.length)
        return logits

    def logits_of_rows(self, tokens: Sequence[int], caches: Sequence[KVCache], extended: bool) -> Tensor:
        """The same for several sequences, a token for each: float32 [n, vocab], a row for a row equal to `logits`."""
        return self.logits_of_prompts([[token] for token in tokens], caches, extended)

    def logits_of_prompts(self, prompts: Sequence[Sequence[int]], caches: Sequence[KVCache], extended: bool) -> Tensor:
        """The same for several sequences and some tokens for each: float32 [n, vocab], at the last token of each.

        Logits, keys and values are equal to those of one `logits` after the other. `caches` are all different.
        """
        rooms = [cache.all_rooms(len(prompt)) for prompt, cache in zip(prompts, caches, strict=True)]
        lengths, counts = [cache.length for cache in caches], [len(prompt) for prompt in prompts]
        cos, sin = self._angles.of_rows([length + at for length, count in zip(lengths, counts, strict=True)
                                         for at in range(count)], extended)
        hidden: Tensor = self._embedding(torch.tensor([token for prompt in prompts for token in prompt]))
        if self._multiplier != 1.0:
            hidden = hidden * self._multiplier
        logits: Tensor = self._decoder.run_rows(hidden, cos, sin, [each for keys, _ in rooms for each in keys],
                                                [each for _, values in rooms for each in values], counts, lengths)
        return logits

    def _embedded(self, token: int) -> Tensor:
        if type(self._embedding) is nn.Embedding:
            row = self._embedding.weight.narrow(0, token, 1)
        else:
            row = self._embedding(torch.tensor([token]))
        return row if self._multiplier == 1.0 else row * self._multiplier


@dataclass(frozen=True)
class DecoderParts:
    """A decoder as C++ takes it: its class, and the operator `torchchat::decode_token` of graphs."""

    tensors: list[Tensor]  # norms and biases in float32, which the decoder computes in
    numbers: list[int]
    scalars: list[float]


def decoder_parts(module: Transformer) -> DecoderParts:
    """The lists of a module of which `decodes` is true. Weights are shared, not copied."""
    config, layers = module.config, _layers(module)
    parts = DecoderParts([], [config.num_heads, config.num_kv_heads, config.head_dim, int(config.rope_interleaved),
                              len(layers), int(config.qk_norm)],
                         [config.norm_eps, config.attention_scale, config.residual_multiplier, config.logits_divisor])
    for index, layer in enumerate(layers):
        parts.numbers.append(config.layer_window(index) or 0)
        for product in _products(layer):
            _put_product(parts, product)
        norms = (layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm)
        parts.tensors.extend(norm.weight.detach().float() for norm in norms if norm is not None)
    _put_product(parts, module.lm_head)
    parts.tensors.append(module.model.norm.weight.detach().float())
    return parts


def _put_product(parts: DecoderParts, layer: nn.Module) -> None:
    if isinstance(layer, PanelLinear):
        weight, form = layer.packed, [layer.bits, layer.group_size, int(layer.asymmetric)]
    else:
        layer = cast(DenseLinear, layer)
        weight, form = layer.weight.detach(), [0, 0, 0]
    parts.numbers.extend([layer.out_features, layer.in_features, *form, int(layer.bias is not None)])
    parts.tensors.append(weight)
    if layer.bias is not None:
        parts.tensors.append(layer.bias.detach().float())


class RotaryTable:
    """The angles of positions that were asked for before, and of those up to the next power of two."""

    def __init__(self, rotary: RotaryEmbedding, positions: int) -> None:
        """`positions`: what a sequence may have."""
        self._rotary, self._positions = rotary, positions
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}

    def at(self, position: int, extended: bool) -> tuple[Tensor, Tensor]:
        """What `RotaryEmbedding` gives for one position: cos, signed sin, each [1, 1, head_dim] float32."""
        cos, sin = self._table(position, extended)
        return cos.narrow(0, position, 1), sin.narrow(0, position, 1)

    def of_rows(self, positions: Sequence[int], extended: bool) -> tuple[Tensor, Tensor]:
        """The same for several positions: [n, 1, head_dim] each."""
        cos, sin = self._table(max(positions), extended)
        places = torch.tensor(positions)
        return cos[places], sin[places]

    def _table(self, position: int, extended: bool) -> tuple[Tensor, Tensor]:
        table = self._tables.get(extended)
        if table is None or len(table[0]) <= position:
            count = min(max(FIRST_CAPACITY, 1 << position.bit_length()), self._positions)
            table = self._tables[extended] = self._rotary(torch.arange(count), extended)
        return table  # whatever other threads put in its place meanwhile


def decodes(module: Transformer) -> bool:
    """Whether all parts of a transformer are exactly the classes whose computation the C++ code repeats."""
    if type(module) is not Transformer or not module.model.layers:
        return False
    norm, embedding = module.model.norm, module.model.embed_tokens
    if type(embedding) is nn.Embedding and embedding.weight.dtype != norm.weight.dtype:
        return False
    return (norm.weight.device.type == "cpu" and norm.weight.dtype in (torch.float32, torch.bfloat16)
            and type(norm) in (RMSNorm, KernelNorm) and _is_known_product(module.lm_head, norm.weight.dtype)
            and all(_is_known(layer, norm.weight.dtype) for layer in module.model.layers))


def _layers(module: Transformer) -> Sequence[DecoderLayer]:
    return cast(Sequence[DecoderLayer], module.model.layers)


def _is_known(layer: nn.Module, dtype: torch.dtype) -> bool:
    if type(layer) is not DecoderLayer or type(layer.self_attn) is not Attention or type(layer.mlp) is not FeedForward:
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm)
    return (all(norm is None or type(norm) in (RMSNorm, KernelNorm) for norm in norms)
            and all(_is_known_product(each, dtype) for each in _products(layer)))


def _products(layer: DecoderLayer) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
            mlp.down_proj)


def _is_known_product(layer: nn.Module, dtype: torch.dtype) -> bool:
    if type(layer) is DenseLinear:
        return layer.weight.dtype == dtype and layer.weight.is_contiguous()
    return type(layer) is PanelLinear
