"""Tokens of one sequence, or of several, from embedding to logits in a single call: core's C++ `Decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import cast

import torch
from torch import Tensor, nn

from torchchat_core.kernels.layers import DenseLinear, KernelNorm
from torchchat_core.kernels.serial import one_thread
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import FIRST_CAPACITY, KVCache
from torchchat_core.models.rotary import RotaryEmbedding
from torchchat_core.models.transformer import Attention, DecoderLayer, FeedForward, RMSNorm, Transformer
from torchchat_core.quantization.running import PanelLinear


class TokenDecoder:
    """Decodes as `Transformer` does, one token of each sequence at a time.

    It shares the weights, but for the float32 ones of small models, of which it has a copy in another order.
    """

    def __init__(self, parts: DecoderParts, embedding: nn.Module, rotary: RotaryEmbedding, config: ModelConfig) -> None:
        """`kernels.load` has to have succeeded. Raises `RuntimeError` where the parts do not belong together."""
        self._decoder = torch.classes.torchchat.Decoder(config.hidden_size, parts.tensors, parts.numbers, parts.scalars)
        self._embedding, self._multiplier = embedding, config.embedding_multiplier
        self._table = embedding.weight.detach().contiguous() if type(embedding) is nn.Embedding else None
        self._angles = RotaryTable(rotary, config.max_context)

    @classmethod
    def of(cls, module: Transformer) -> TokenDecoder:
        """The decoder of a module of which `decodes` is true."""
        return cls(decoder_parts(module), module.model.embed_tokens, module.model.rotary, module.config)

    def logits(self, token: int, cache: KVCache, extended: int) -> Tensor:
        """Of the token behind those that the cache holds, which gets its keys and values: float32 [1, vocab].

        Raises `TorchchatError` where the cache is full; `cache.advance` is left to the caller.
        """
        return self._run([token], [_memory(cache, 1)], [1], [cache.length], extended)

    def logits_of_rows(self, tokens: Sequence[int], caches: Sequence[KVCache], extended: int) -> Tensor:
        """The same for several sequences, a token for each: float32 [n, vocab], a row for a row equal to `logits`."""
        return self._run(tokens, [_memory(cache, 1) for cache in caches], [1] * len(caches),
                         [cache.length for cache in caches], extended)

    def logits_of_prompts(self, prompts: Sequence[Sequence[int]], caches: Sequence[KVCache], extended: int) -> Tensor:
        """The same for several sequences and some tokens for each: float32 [n, vocab], at the last token of each.

        Logits, keys and values are equal to those of one `logits` after the other. `caches` are all different.
        """
        memory = [_memory(cache, len(prompt)) for prompt, cache in zip(prompts, caches, strict=True)]
        tokens = [token for prompt in prompts for token in prompt]
        return self._run(tokens, memory, list(map(len, prompts)), [cache.length for cache in caches], extended)

    def _run(self, tokens: Sequence[int], memory: list[int], counts: list[int], lengths: list[int], extended: int
             ) -> Tensor:
        cos, sin = self._angles.up_to(max(map(add, lengths, counts)), extended)
        table = self._table
        if table is None:  # it is quantised
            table, tokens = self._embedding(torch.tensor(tokens)).contiguous(), range(len(tokens))
        logits: Tensor = self._decoder.run_rows(table, list(tokens), self._multiplier, cos, sin, memory, counts,
                                                lengths)
        return logits


class _KnownMemory:
    """The memory of a cache, as C++ knows it: by a number, as long as this is there."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self._held = torch.classes.torchchat.Cache(keys, values)
        self.number: int = self._held.number()


def _memory(cache: KVCache, count: int) -> int:
    """The number of a cache with room for `count` more positions."""
    known: _KnownMemory = cache.all_rooms_as(_KnownMemory, count)
    return known.number


@dataclass(frozen=True)
class DecoderParts:
    """A decoder as C++ takes it: its class, and the operator `torchchat::decode_token` of graphs."""

    tensors: list[Tensor]  # norms and biases in float32, which the decoder computes in
    numbers: list[int]
    scalars: list[float]


def decoder_parts(module: Transformer) -> DecoderParts:
    """The lists of a module of which `decodes` is true, with its own weights."""
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
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}  # key: extended or not

    def up_to(self, count: int, extended: int) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin of `RotaryEmbedding` for at least `count` positions, float32 [n, 1, head_dim].

        With dynamic scaling, each extended position gets the frequencies of a sequence that ends there, as in decoding.
        """
        table = self._tables.get(bool(extended))
        if table is None or len(table[0]) < count:
            count = min(max(FIRST_CAPACITY, 1 << (count - 1).bit_length()), self._positions)
            positions = torch.arange(count)
            each = positions + 1 if extended and self._rotary.dynamic is not None else extended
            with one_thread():  # MKL would start threads for a few hundred cosines
                cos, sin = self._rotary(positions, each)
            table = self._tables[bool(extended)] = cos.contiguous(), sin.contiguous()
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
