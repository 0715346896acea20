"""What the reference executor adds to the transformer: sessions, batches, devices, and its own linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tc_eager.executor import EagerExecutor, EagerModel
from tc_eager.layers import OneDnnLinear
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.layers import DenseLinear, DenseLinears, KernelNorm
from torchchat_core.models.config import ModelConfig, RopeScaling
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.quantization.running import PanelLinear
from torchchat_core.specs import LoadRequest

SIZES: dict[str, Any] = {"architecture": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                         "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_context": 64}


def load(dtype: str = "fp32", device: str = "cpu", **changes: Any) -> EagerModel:
    torch.manual_seed(0)
    module = Transformer(ModelConfig(**{**SIZES, **changes})).eval().requires_grad_(False)
    module = module.to(device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    return EagerExecutor().load(LoadRequest(device=device, dtype=dtype, module=module))


def test_a_batch_gives_each_sequence_what_it_gets_alone() -> None:
    model = load(sliding_window=6)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]
    together, alone = ([model.session() for _ in prompts] for _ in range(2))
    for session, single, prompt in zip(together, alone, prompts, strict=True):
        session.prefill(prompt)
        single.prefill(prompt)
    for step in range(5):
        tokens = [20 + step, 30 + step, 40 + step]
        logits = model.decode_batch(together, tokens)
        expected = [single.decode(token) for single, token in zip(alone, tokens, strict=True)]
        torch.testing.assert_close(logits, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert [session.length for session in together] == [8, 6, 13]


def test_a_batch_over_both_kinds_of_longrope_sequences_is_right() -> None:
    scaling = RopeScaling(kind="longrope", factor=4.0, original_context=16, short_factor=(1.0,) * 4,
                          long_factor=(4.0,) * 4)
    model = load(rope_scaling=scaling)
    short, long, again = model.session(16), model.session(64), model.session(64)
    for session in (short, long, again):
        session.prefill([1, 2, 3])
    logits = model.decode_batch([short, long], [4, 5])
    torch.testing.assert_close(logits[1], again.decode(5), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3]])
def test_a_batch_of_the_wrong_size_is_refused(tokens: list[int]) -> None:
    model = load()
    with pytest.raises(TorchchatError, match="it takes one for each of several different sessions"):
        model.decode_batch([model.session(), model.session()], tokens)
    session = model.session()
    with pytest.raises(TorchchatError, match="different sessions"):
        model.decode_batch([session, session], [1, 2])


def test_a_full_session_in_a_batch_leaves_the_others_as_they_were() -> None:
    model = load()
    full, other = model.session(3), model.session()
    full.prefill([1, 2, 3])
    other.prefill([1])
    with pytest.raises(TorchchatError, match="its limit is 3"):
        model.decode_batch([other, full], [1, 1])
    assert other.length == 1


def test_cutting_and_going_on_equals_a_fresh_sequence() -> None:
    model = load()
    session, fresh = model.session(), model.session()
    session.prefill([1, 2, 3, 4, 5])
    session.decode(6)
    session.truncate(2)
    assert session.length == 2
    fresh.prefill([1, 2])
    torch.testing.assert_close(session.prefill([7, 8]), fresh.prefill([7, 8]), atol=1e-6, rtol=1e-5)


def test_sessions_do_not_see_each_other() -> None:
    model = load()
    first, second, alone = (model.session() for _ in range(3))
    first.prefill([1, 2, 3])
    second.prefill([9, 9])
    first.decode(4)
    torch.testing.assert_close(second.decode(5), (alone.prefill([9, 9]), alone.decode(5))[1])


def test_scores_are_the_logits_of_each_position() -> None:
    model = load()
    tokens = [3, 1, 4, 1, 5]
    stepwise = model.session()
    expected = torch.stack([stepwise.decode(token) for token in tokens])
    torch.testing.assert_close(model.session().score(tokens), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_is_near_and_logits_come_in_float32(dtype: str, tolerance: float) -> None:
    exact, near = load().session().score([1, 2, 3, 4]), load(dtype).session().score([1, 2, 3, 4])
    assert near.dtype == torch.float32
    assert float((near - exact).abs().max()) < tolerance * float(exact.abs().max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(dtype: str) -> None:
    exact, there = load().session().score([1, 2, 3, 4]), load(dtype, "cuda").session()
    assert float((there.score([1, 2, 3, 4]) - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert there.decode(5).device.type == "cpu"


@pytest.mark.parametrize(("token", "message"), [(64, "token 64 is outside"), (-1, "token -1 is outside")])
def test_a_token_outside_the_vocabulary_is_refused(token: int, message: str) -> None:
    session = load().session()
    with pytest.raises(TorchchatError, match=message):
        session.decode(token)
    assert session.length == 0


def test_limits_are_kept_and_told() -> None:
    model = load()
    with pytest.raises(TorchchatError, match="a sequence of 65 tokens was asked for; the model takes 1 to 64"):
        model.session(65)
    session = model.session(4)
    with pytest.raises(TorchchatError, match="would have 5 tokens; its limit is 4"):
        session.prefill([1, 2, 3, 4, 5])
    with pytest.raises(TorchchatError, match="no tokens"):
        session.prefill([])


def test_closing_gives_memory_back_and_later_use_is_told() -> None:
    model = load()
    session = model.session()
    session.prefill([1, 2])
    session.close()
    assert session.cache.bytes_held() == 0
    model.close()
    with pytest.raises(TorchchatError, match="the model was closed"):
        model.session()
    with pytest.raises(TorchchatError, match="the session was closed"):
        session.decode(1)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_one_dnn_gives_what_linear_gives(bias: bool, rows: int) -> None:
    layer = nn.Linear(300, 200, bias=bias).requires_grad_(False)
    x = torch.randn(rows, 300)
    torch.testing.assert_close(OneDnnLinear(layer)(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
def test_without_the_kernels_large_float32_layers_go_to_one_dnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCHAT_CPU_KERNELS", "off")
    large = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_heads": 8, "num_kv_heads": 2}
    module = load(**large, tied_embeddings=True).module
    assert isinstance(module.model.layers[0].mlp.up_proj, OneDnnLinear)
    assert type(module.model.layers[0].self_attn.k_proj) is nn.Linear
    assert module.model.layers[0].self_attn.qkv is None
    assert not any(isinstance(layer, OneDnnLinear) for layer in load("bf16", **large).module.modules())


@pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_the_kernels_layers_are_swapped_and_joined_and_their_weights_are_shared(dtype: str) -> None:
    module = load(dtype, tied_embeddings=True).module
    assert isinstance(module.lm_head, DenseLinear)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert isinstance(module.model.norm, KernelNorm)
    joined, attention = module.model.layers[0].self_attn.qkv, module.model.layers[0].self_attn
    assert isinstance(joined, DenseLinears)
    assert joined.weight1 is attention.k_proj.weight


@pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"qk_norm": True},
                                     {"rope_interleaved": True, "sliding_window": 5}], ids=str)
def test_with_and_without_the_kernels_a_model_says_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    tokens = [(7 * i) % 64 for i in range(40)]
    found = load(**changes).session()
    with_kernels = torch.cat([found.score(tokens[:20]), found.score(tokens[20:25]), found.decode(tokens[25])[None]])
    monkeypatch.setenv("TORCHCHAT_CPU_KERNELS", "off")
    torch.testing.assert_close(with_kernels, load(**changes).session().score(tokens[:26]), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
def test_quantised_layers_are_packed_for_the_kernels_and_the_embedding_may_be_quantised() -> None:
    torch.manual_seed(0)
    module = Transformer(ModelConfig(**SIZES)).eval().requires_grad_(False)
    quantise_layers(module, "linear:int8", WeightFormat(bits=8))
    quantise_layers(module, "embedding:int8", WeightFormat(bits=8))
    model = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))
    assert isinstance(model.module.lm_head, PanelLinear)
    exact, found = load().session().score([1, 2, 3, 4]), model.session().score([1, 2, 3, 4])
    assert float((found - exact).norm() / exact.norm()) < 0.05
