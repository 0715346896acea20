"""One token in one call: the C++ decoder says what the transformer says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchchat_core import kernels
from torchchat_core.kernels.layers import use_kernel_linear
from torchchat_core.models.config import ModelConfig, RopeScaling
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.quantization.running import prepare
from torchchat_core.testing.models import reference_logits, seeded, tiny_config

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
TOKENS = [(7 * i) % 96 for i in range(30)]


def decoder(module: Transformer) -> Any:
    from torchchat_core.kernels.decoding import TokenDecoder, decodes

    prepare(module, module.model.norm.weight.dtype)
    use_kernel_linear(module)
    assert decodes(module)
    return TokenDecoder.of(module)


def decoded(module: Transformer, tokens: list[int], extended: bool = False) -> torch.Tensor:
    """Logits of each token, [n, vocab]."""
    found = decoder(module)
    cache = KVCache(module.config, 600, module.model.norm.weight.dtype, torch.device("cpu"))
    rows = []
    for token in tokens:
        rows.append(found.logits(token, cache, extended))
        cache.advance(1)
    return torch.cat(rows)


@pytest.mark.parametrize("changes", [
    {}, {"rope_interleaved": True}, {"attention_bias": True, "mlp_bias": True, "attention_output_bias": True},
    {"qk_norm": True}, {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                        "logits_divisor": 4.0},
    {"sliding_window": 6, "sliding_layers": (True, False)}, {"num_kv_heads": 1}, {"tied_embeddings": True},
    {"intermediate_size": 40, "vocab_size": 97}, {"hidden_size": 512, "vocab_size": 4160},
], ids=str)
def test_every_kind_of_layer_gives_the_logits_of_the_transformer(instructions: str, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    expected = reference_logits(seeded(config), TOKENS)
    torch.testing.assert_close(decoded(seeded(config), TOKENS), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", [-1e38, -1e30, -100.0, -80.0, -1.0, 30.0])
def test_gates_of_any_size_are_those_of_silu(instructions: str, gate: float) -> None:
    module = seeded(tiny_config(num_layers=1, mlp_bias=True))
    mlp = module.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.bias.fill_(gate)
        mlp.up_proj.bias.fill_(1e6 if gate < -50 else 1.0)  # so that what is nearly nothing would be seen
    expected = reference_logits(module, [1, 2, 3])
    torch.testing.assert_close(decoded(copy.deepcopy(module), [1, 2, 3]), expected, atol=2e-5, rtol=1e-4)


def test_a_sequence_longer_than_the_first_cache_goes_on() -> None:
    config = tiny_config(max_context=700)
    tokens = [(5 * i) % 96 for i in range(300)]
    torch.testing.assert_close(decoded(seeded(config), tokens), reference_logits(seeded(config), tokens), atol=5e-5,
                               rtol=1e-3)


def test_long_sequences_of_longrope_have_their_own_angles() -> None:
    scaling = RopeScaling(kind="longrope", factor=2.0, original_context=16, short_factor=(1.0,) * 4,
                          long_factor=(3.0,) * 4)
    config = tiny_config(head_dim=8, rope_scaling=scaling)
    short, long = (decoded(seeded(config), TOKENS, extended) for extended in (False, True))
    assert not torch.allclose(short[5:], long[5:], atol=1e-3)


@pytest.mark.parametrize("form", [WeightFormat(bits=4, group_size=32), WeightFormat(bits=8),
                                  WeightFormat(bits=4, group_size=32, asymmetric=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_layers_give_what_they_give_one_by_one(instructions: str, form: WeightFormat, dtype: torch.dtype
                                                         ) -> None:
    def module() -> Transformer:
        made = seeded(tiny_config()).to(dtype)
        quantise_layers(made, "linear:int4", form)
        return made

    exact = reference_logits(module().float() if dtype == torch.float32 else module(), TOKENS).float()
    found = decoded(module(), TOKENS)
    assert float((found - exact).norm() / exact.norm()) < 0.03


def test_formats_may_differ_from_matrix_to_matrix() -> None:
    module = seeded(tiny_config())
    mlp = module.model.layers[0].mlp
    quantise_layers(mlp, "linear:int8", WeightFormat(bits=8))
    expected = reference_logits(module, TOKENS)
    found = decoded(module, TOKENS)
    assert float((found - expected).norm() / expected.norm()) < 0.02


class Unknown(nn.Linear):
    """Might compute anything."""


def test_layers_of_another_class_are_not_decoded() -> None:
    from torchchat_core.kernels.decoding import decodes

    for path in ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj", "lm_head"):
        module = seeded(tiny_config())
        use_kernel_linear(module)
        assert decodes(module)
        layer = module.get_submodule(path)
        module.set_submodule(path, Unknown(layer.in_features, layer.out_features, bias=False))
        assert not decodes(module), path
    assert not decodes(seeded(tiny_config()).half())


@pytest.mark.parametrize(("change", "words"), [
    (lambda parts: parts.numbers.__setitem__(1, 3), "heads over"),
    (lambda parts: parts.numbers.__setitem__(4, 3), "too few"),
    (lambda parts: parts.numbers.__setitem__(7, 0), "a matrix of 0 rows"),
    (lambda parts: parts.numbers.__setitem__(9, 3), "3 bits"),
    (lambda parts: parts.numbers.pop(), "too few"),
    (lambda parts: parts.scalars.pop(), "3 scalars"),
    (lambda parts: parts.tensors.pop(), "too few"),
    (lambda parts: parts.tensors.__setitem__(0, parts.tensors[0][:, :-1].contiguous()), "and not of"),
    (lambda parts: parts.tensors.__setitem__(0, parts.tensors[0].half()), "has to be bfloat16 or float32"),
    (lambda parts: parts.tensors.__setitem__(0, parts.tensors[0].t()), "contiguous"),
    (lambda parts: parts.tensors.__setitem__(7, parts.tensors[7][:-1]), "a norm of"),
])
def test_parts_that_do_not_belong_together_are_refused(change: Callable[[Any], object], words: str) -> None:
    from torchchat_core.kernels.decoding import decoder_parts

    module = seeded(tiny_config())
    use_kernel_linear(module)
    parts, size = decoder_parts(module), module.config.hidden_size
    change(parts)
    with pytest.raises(RuntimeError, match=words):
        torch.classes.torchchat.Decoder(size, parts.tensors, parts.numbers, parts.scalars)


@pytest.mark.parametrize("wrong", ["hidden", "angles", "dtype", "capacity", "layers"])
def test_wrong_tensors_are_refused_and_not_read(wrong: str) -> None:
    config: ModelConfig = tiny_config()
    made = decoder(seeded(config))._decoder
    caches = [torch.zeros(config.num_kv_heads, 4, config.head_dim) for _ in range(config.num_layers)]
    hidden, angles, held = torch.ones(1, config.hidden_size), torch.ones(config.head_dim), 3
    made.run(hidden, angles, angles, caches, caches, held)
    if wrong == "hidden":
        hidden = hidden[:, :-1]
    elif wrong == "angles":
        angles = angles[:-1]
    elif wrong == "dtype":
        hidden = hidden.bfloat16()
    elif wrong == "capacity":
        held = 4
    else:
        caches = caches[:-1]
    with pytest.raises(RuntimeError):
        made.run(hidden, angles, angles, caches, caches, held)
