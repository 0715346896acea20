"""tc_gguf.checkpoint and tc_gguf.config: golden results of real files, and every variation of small made ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_eager.executor import EagerExecutor, EagerModel
from tc_gguf import tensors as tensors_module
from tc_gguf.checkpoint import GgufCheckpoint, GgufSource, canonical_name
from tc_gguf.file import read_gguf
from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig, RopeScaling
from torchchat_core.models.rotary import rotary_amplitude, rotary_frequencies
from torchchat_core.models.weights import build_model
from torchchat_core.pipeline import open_files
from torchchat_core.plugins import load_registry
from torchchat_core.sources.local import LocalSource
from torchchat_core.specs import Checkpoint, LoadRequest, ModelRef
from torchchat_core.testing.models import tiny_config

MODELS = tuple(f"TinyStories-656K-{kind}" for kind in ("BF16", "F16", "Q4_0", "Q5_1", "Q8_0")) + tuple(
    f"synth256-{kind}" for kind in ("F16", "Q4_K_M", "Q6_K", "Q8_0"))
Tensors = Mapping[str, tuple[int, tuple[int, ...], bytes]]
Make = Callable[..., bytes]
Open = Callable[[bytes], GgufCheckpoint]


def opened(path: Path) -> GgufCheckpoint:
    files = LocalSource().fetch(ModelRef(text=str(path), scheme="file", location=str(path)))
    return GgufSource().open(files)


def running(checkpoint: Checkpoint) -> EagerModel:
    module = build_model(checkpoint, torch.float32)
    return EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))


@pytest.fixture
def open_bytes(written: Callable[[bytes], Path]) -> Open:
    return lambda raw: opened(written(raw))


# ---- real files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(testdata: Path) -> Mapping[str, Any]:
    models: Mapping[str, Any] = json.loads((testdata / "golden" / "gguf.json").read_text(encoding="utf-8"))["models"]
    return models


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_real_file_has_the_golden_numbers(
    testdata: Path, golden: Mapping[str, Any], name: str
) -> None:
    checkpoint = opened(testdata / golden[name]["file"])
    wanted = golden[name]["dequantized_f32_sha256"]
    numbers = {each: checkpoint.tensor(canonical_name(each), torch.float32).numpy() for each in wanted}
    assert {each: hashlib.sha256(value.tobytes()).hexdigest() for each, value in numbers.items()} == wanted


@pytest.mark.parametrize("name", MODELS)
def test_a_real_file_gives_the_golden_logits_and_greedy_ids(
    testdata: Path, golden: Mapping[str, Any], name: str
) -> None:
    model = running(opened(testdata / golden[name]["file"]))
    ids, prompt = golden[name]["greedy_ids"], golden[name]["prompt_ids"]
    logits = model.session().score(ids[:16]).numpy()
    np.testing.assert_allclose(logits, np.load(testdata / "golden" / "gguf" / f"{name}.logits16.npy"), atol=1e-4)
    session = model.session()
    said = [*prompt, int(session.prefill(prompt).argmax())]
    while len(said) < len(ids):
        said.append(int(session.decode(said[-1]).argmax()))
    assert said == ids


def test_a_gguf_file_and_a_hugging_face_folder_of_one_model_agree(testdata: Path) -> None:
    folder = testdata / "hf" / "stories260K"
    files = LocalSource().fetch(ModelRef(text=str(folder), scheme="file", location=str(folder)))
    ids = [1, 403, 407, 261, 378, 30, 12, 500]
    ours = running(opened(testdata / "tinyllamas" / "stories260K" / "stories260K.gguf")).session().score(ids)
    torch.testing.assert_close(ours, running(LocalSource().open(files)).session().score(ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), [("TinyStories-656K-F16", torch.float16),
                                             ("TinyStories-656K-BF16", torch.bfloat16),
                                             ("synth256-F16", torch.float16), ("synth256-Q4_K_M", torch.bfloat16)])
def test_the_dtype_is_that_of_most_numbers(testdata: Path, name: str, dtype: torch.dtype) -> None:
    assert opened(testdata / "gguf" / f"{name}.gguf").dtype == dtype


# ---- tensors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(open_bytes: Open, tiny_gguf: bytes) -> GgufCheckpoint:
    return open_bytes(tiny_gguf)


def test_a_file_is_opened_by_the_installed_source(tmp_path: Path, tiny_gguf: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf)
    files = LocalSource().fetch(ModelRef(text=str(path), scheme="file", location=str(path)))
    checkpoint = open_files(files, load_registry())
    assert checkpoint.config.vocab_size == 320
    assert running(checkpoint).session().score([1, 2, 3]).isfinite().all()


def test_plain_tensors_are_mapped_and_quantised_ones_unpacked(tiny: GgufCheckpoint) -> None:
    plain, packed = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = tiny.tensor(plain), tiny.tensor(plain, torch.float16)
    assert first.dtype == torch.float16
    assert first.data_ptr() == second.data_ptr()
    assert tiny.tensor(plain, torch.bfloat16).dtype == torch.bfloat16
    assert tiny.tensor(packed).dtype == torch.float32
    torch.testing.assert_close(tiny.tensor(packed, torch.bfloat16), tiny.tensor(packed).bfloat16(), atol=0, rtol=0)


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path, tiny: GgufCheckpoint,
                                                            tiny_gguf: bytes) -> None:
    tiny.tensor("model.norm.weight").zero_()
    assert (tmp_path / "model.gguf").read_bytes() == tiny_gguf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacking_in_pieces_gives_the_same_numbers(tiny: GgufCheckpoint, monkeypatch: pytest.MonkeyPatch,
                                                    dtype: torch.dtype) -> None:
    whole = {name: tiny.tensor(name, dtype) for name in tiny.names()}
    for piece in ("PIECE", "KERNEL_PIECE"):
        monkeypatch.setattr(tensors_module, piece, 96)  # three blocks, which no tensor is a multiple of
    for name, tensor in whole.items():
        assert torch.equal(tiny.tensor(name, dtype), tensor)


def test_q4_0_q8_0_and_q4_k_can_stay_packed(tiny: GgufCheckpoint, testdata: Path) -> None:
    assert tiny.packed("model.layers.0.self_attn.v_proj.weight") is None
    assert tiny.packed("model.norm.weight") is None
    synthetic = opened(testdata / "gguf" / "synth256-Q4_K_M.gguf")
    for checkpoint, name, kind, row in ((tiny, "model.layers.0.self_attn.q_proj.weight", "q8_0", 68),
                                        (tiny, "model.layers.0.mlp.down_proj.weight", "q4_0", 54),
                                        (synthetic, "model.layers.0.self_attn.q_proj.weight", "q4_k", 144)):
        packed = checkpoint.packed(name)
        assert packed is not None
        assert (packed.kind, packed.shape) == (kind, tuple(checkpoint.tensor(name).shape))
        assert packed.data.dtype == torch.uint8
        assert packed.data.shape == (packed.shape[0], row)
    assert synthetic.packed("lm_head.weight") is None  # Q6_K


def test_a_tensor_that_is_not_there_is_a_key_error(tiny: GgufCheckpoint) -> None:
    for ask in (tiny.tensor, tiny.packed):
        with pytest.raises(KeyError):
            ask("lm_head.weight")


def test_a_file_that_is_cut_off_after_opening_is_refused(tmp_path: Path, tiny: GgufCheckpoint) -> None:
    os.truncate(tmp_path / "model.gguf", 30_000)
    with pytest.raises(TorchchatError, match=r"model\.gguf became shorter while it was read"):
        tiny.tensor("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(TorchchatError, match=r"model\.gguf became shorter while it was read"):
        tiny.packed("model.layers.1.mlp.down_proj.weight")


def test_split_files_are_one_checkpoint(tmp_path: Path, make_gguf: Make, tiny_metadata: Mapping[str, Any],
                                        tiny_tensors: Tensors, tiny: GgufCheckpoint) -> None:
    names = list(tiny_tensors)
    for number, part in enumerate((names[:7], names[7:])):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        metadata = {**tiny_metadata, **split} if number == 0 else split
        (tmp_path / f"part-{number + 1:05}-of-00002.gguf").write_bytes(
            make_gguf(metadata, {name: tiny_tensors[name] for name in part}))
    both = opened(tmp_path / "part-00002-of-00002.gguf")
    assert set(both.names()) == set(tiny.names())
    assert all(torch.equal(both.tensor(name), tiny.tensor(name)) for name in tiny.names())


def test_the_configuration_cannot_be_replaced_and_nothing_is_fetched(tmp_path: Path) -> None:
    from torchchat_core.specs import ModelFiles

    ref = ModelRef(text="model.gguf", scheme="file", location="model.gguf")
    files = ModelFiles(ref=ref, format="gguf", root=tmp_path, weights=(tmp_path / "model.gguf",),
                       config=tmp_path / "params.json")
    with pytest.raises(TorchchatError, match="states its own configuration") as caught:
        GgufSource().open(files)
    assert "--params-path" in str(caught.value.fix)
    with pytest.raises(TorchchatError, match="fetches none"):
        GgufSource().fetch(ref)


# ---- configuration ------------------------------------------------------------------------------------------------


@pytest.fixture
def config(open_bytes: Open, make_gguf: Make, tiny_metadata: Mapping[str, Any],
           tiny_tensors: Tensors) -> Callable[..., ModelConfig]:
    """The configuration of the tiny file with changed metadata (None: left out) and more tensors.

    Keys that start with a dot have the architecture put before them.
    """
    def config(changes: Mapping[str, Any], more: Tensors | None = None, architecture: str = "llama") -> ModelConfig:
        metadata = {key.replace("llama.", f"{architecture}.") if key.startswith("llama.") else key: value
                    for key, value in tiny_metadata.items()} | {"general.architecture": architecture}
        metadata |= {f"{architecture}{key}" if key.startswith(".") else key: value for key, value in changes.items()}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        return open_bytes(make_gguf(metadata, {**tiny_tensors, **(more or {})})).config
    return config


def numbers(values: list[float]) -> tuple[int, tuple[int, ...], bytes]:
    return 0, (len(values),), np.array(values, np.float32).tobytes()


MINUS_ONE = (5).to_bytes(4, "little") + (-1).to_bytes(4, "little", signed=True)
UINT64 = (10).to_bytes(4, "little")  # the type that a value of eight bytes has
BIAS = numbers([0.0] * 64)


def test_sizes_are_read_from_metadata_and_the_embedding(config: Callable[..., ModelConfig]) -> None:
    assert config({}) == ModelConfig(
        architecture="llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, max_context=32, norm_eps=float(np.float32(1e-5)), rope_interleaved=True,
        tied_embeddings=True)


@pytest.mark.parametrize(("architecture", "name", "interleaved"), [
    ("llama", "llama", True), ("mistral3", "mistral", True), ("qwen2", "qwen2", False), ("qwen3", "qwen3", False),
    ("granite", "granite", True)])
def test_the_rotary_order_is_that_of_the_architecture(config: Callable[..., ModelConfig], architecture: str, name: str,
                                                      interleaved: bool) -> None:
    made = config({}, architecture=architecture)
    assert (made.architecture, made.rope_interleaved) == (name, interleaved)


@pytest.mark.parametrize(("tensors", "changes"), [
    ({"output.weight": (0, (320, 64), bytes(320 * 64 * 4))}, {"tied_embeddings": False}),
    ({"blk.0.attn_q.bias": BIAS}, {"attention_bias": True}),
    ({"blk.0.attn_output.bias": BIAS}, {"attention_output_bias": True}),
    ({"blk.0.ffn_down.bias": BIAS}, {"mlp_bias": True}),
    ({"blk.0.attn_q_norm.weight": BIAS}, {"qk_norm": True}),
])
def test_tensors_that_are_there_say_what_the_model_has(config: Callable[..., ModelConfig], tensors: Tensors,
                                                       changes: Mapping[str, Any]) -> None:
    made, plain = config({}, tensors), config({})
    assert {name: getattr(made, name) for name in changes} == changes
    assert {name: not value for name, value in changes.items()} == {name: getattr(plain, name) for name in changes}


def test_granite_has_its_multipliers(config: Callable[..., ModelConfig]) -> None:
    made = config({".embedding_scale": 12.0, ".residual_scale": 0.25, ".attention.scale": 0.0625, ".logit_scale": 8.0},
                  architecture="granite")
    assert (made.embedding_multiplier, made.residual_multiplier) == (12.0, 0.25)
    assert (made.attention_multiplier, made.logits_divisor) == (0.0625, 8.0)


@pytest.mark.parametrize(("changes", "wanted"), [
    ({".attention.head_count_kv": None}, {"num_kv_heads": 4}),
    ({".attention.head_count_kv": [2, 2]}, {"num_kv_heads": 2}),
    ({".attention.key_length": 32, ".attention.value_length": 32, ".rope.dimension_count": 32}, {"head_dim": 32}),
    ({".rope.dimension_count": None}, {"head_dim": 16}),
    ({".rope.freq_base": 500000.0}, {"rope_theta": 500000.0}),
    ({".attention.sliding_window": 16}, {"sliding_window": 16}),
    ({".attention.sliding_window": 0}, {"sliding_window": None}),
])
def test_further_keys_are_read(config: Callable[..., ModelConfig], changes: Mapping[str, Any],
                               wanted: Mapping[str, Any]) -> None:
    made = config(changes)
    assert {name: getattr(made, name) for name in wanted} == wanted


@pytest.mark.parametrize(("changes", "message"), [
    ({"general.architecture": None}, "has no 'general.architecture'"),
    ({"general.architecture": "qwen2moe"},
     r"unknown architecture 'qwen2moe'; known are llama, .*granite \(fetch a model"),
    ({"general.architecture": "rwkv"}, "unknown architecture 'rwkv'"),
    ({".block_count": None}, "has no 'llama.block_count'"),
    ({".block_count": "two"}, "llama.block_count is 'two' in model.gguf; it has to be a whole number"),
    ({".block_count": 4_000_000_000}, "block_count is 4000000000 in model.gguf, which has .* none of blk.2"),
    ({".block_count": 3}, "block_count is 3 in model.gguf, which has the tensors of 2 layers, and none of blk.2"),
    ({".block_count": 1}, "block_count is 1 in model.gguf, which has the tensors of 2 layers"),
    ({".block_count": MINUS_ONE}, "block_count is -1 in model.gguf, which has the tensors of 2 layers"),
    ({".attention.head_count": [4] * 7}, "head_count has 7 entries in model.gguf, for 2 layers"),
    ({".attention.head_count_kv": [2]}, "head_count_kv has 1 entries in model.gguf, for 2 layers"),
    ({".vocab_size": 5, "tokenizer.ggml.tokens": None},
     "llama.vocab_size is 5 in model.gguf, whose token_embd.weight has 320 rows"),
    ({".context_length": UINT64 + (1 << 62).to_bytes(8, "little")},
     "in model.gguf, llama.context_length is 4611686018427387904; it has to be a whole number"),
    ({".context_length": 0}, "in model.gguf, llama.context_length is 0"),
    ({".embedding_length": 0}, "embedding_length is 0 in model.gguf, whose token_embd.weight has 64 columns"),
    ({".attention.head_count_kv": 3}, "in model.gguf, llama.attention.head_count 4 is not a multiple of "
                                      "llama.attention.head_count_kv 3"),
    ({".attention.layer_norm_rms_epsilon": 0.0}, "in model.gguf, llama.attention.layer_norm_rms_epsilon is 0.0; it"),
    ({".rope.freq_base": 0.0}, "in model.gguf, llama.rope.freq_base is 0.0; it has to be a positive number"),
    ({".rope.freq_base": -1.0}, "in model.gguf, llama.rope.freq_base is -1.0; it has to be a positive number"),
    ({".rope.scaling.factor": -2.0}, "llama.rope.scaling.factor is -2.0 in model.gguf; it has to be positive"),
    ({".rope.scaling.type": "yarn", ".rope.scaling.original_context_length": 1},
     "in model.gguf, llama.rope.scaling.original_context_length is 1"),
    ({".attention.head_count": 0}, "no llama.attention.key_length"),
    ({".attention.head_count": 5}, "is not a multiple of llama.attention.head_count 5"),
    ({".attention.head_count_kv": [2, 4]}, r"differs from layer to layer in model.gguf: \[2, 4\]"),
    ({".attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    ({".rope.dimension_count": 8}, "it to be the size of a head, 16"),
    ({".attention.value_length": 8}, "it to be the size of a head, 16"),
    ({".expert_count": 8}, "a mixture of 8 experts"),
    ({".attention.causal": False}, "attention is not causal"),
    ({".attention.temperature_scale": 0.1}, "llama.attention.temperature_scale is 0.1"),
    ({".rope.scaling.type": "dynamic"}, "llama.rope.scaling.type is 'dynamic' .*known are none, linear"),
    ({".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.yarn_ext_factor": 0.5},
     "yarn_ext_factor is 0.5"),
])
def test_what_is_missing_wrong_or_unknown_is_refused(config: Callable[..., ModelConfig], changes: Mapping[str, Any],
                                                     message: str) -> None:
    with pytest.raises(TorchchatError) as caught:
        config(changes)
    assert re.search(message, str(caught.value))
    assert "model.gguf" in caught.value.message
    assert caught.value.fix
    assert "config file" not in str(caught.value)


def test_layers_are_numbered_from_0_on(open_bytes: Open, make_gguf: Make, tiny_metadata: Mapping[str, Any],
                                       tiny_tensors: Tensors) -> None:
    for instead in ("blk.2.", "blk.99999999999.", "blk.01.", "blk.x."):
        tensors = {name.replace("blk.1.", instead): tensor for name, tensor in tiny_tensors.items()}
        with pytest.raises(TorchchatError, match="which has the tensors of 2 layers, and none of blk"):
            open_bytes(make_gguf(tiny_metadata, tensors))


def test_the_size_of_the_vocabulary_may_be_stated(config: Callable[..., ModelConfig]) -> None:
    assert config({".vocab_size": 320}).vocab_size == 320


@pytest.mark.parametrize("stated", [300, 330])
def test_a_stale_vocab_size_in_a_file_with_tokens_is_a_warning(config: Callable[..., ModelConfig], stated: int,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    tokens = {"tokenizer.ggml.tokens": [str(number) for number in range(320)]}
    assert config({**tokens, ".vocab_size": stated}).vocab_size == 320
    assert f"vocab_size is {stated}, but token_embd.weight has 320 rows" in caplog.text


def test_the_multiplier_of_yarns_temperature_is_mistral3s_alone(config: Callable[..., ModelConfig]) -> None:
    changes = {**YARN, ".rope.scaling.yarn_log_multiplier": 1.0}
    found = {name: config(changes, architecture=name).rope_scaling for name in ("mistral3", "llama", "qwen2")}
    plain = 1 + 0.1 * math.log(4)
    assert {name: scaling and scaling.attention_factor for name, scaling in found.items()} == {
        "mistral3": 1.0, "llama": plain, "qwen2": plain}
    with pytest.raises(TorchchatError, match=r"yarn_log_multiplier is -100\.0 in model\.gguf"):
        config({**YARN, ".rope.scaling.yarn_log_multiplier": -100.0}, architecture="mistral3")


def test_granite_without_rotary_embedding_is_refused(config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(TorchchatError, match="no rotary position embedding"):
        config({".rope.scaling.finetuned": False}, architecture="granite")


def test_a_vocabulary_alone_and_unread_types_are_refused(open_bytes: Open, make_gguf: Make, tiny_tensors: Tensors,
                                                         tiny_metadata: Mapping[str, Any]) -> None:
    with pytest.raises(TorchchatError, match=r"has no matrix 'token_embd\.weight'"):
        open_bytes(make_gguf(tiny_metadata, {}))
    with pytest.raises(TorchchatError, match="tensors of type IQ2_XXS are not read"):
        open_bytes(make_gguf(tiny_metadata, {**tiny_tensors, "output.weight": (16, (1, 256), bytes(66))}))


def test_a_tensor_without_a_place_keeps_its_name_and_is_refused_at_building(
    open_bytes: Open, make_gguf: Make, tiny_metadata: Mapping[str, Any], tiny_tensors: Tensors
) -> None:
    checkpoint = open_bytes(make_gguf(tiny_metadata, {**tiny_tensors, "blk.0.attn_sinks.weight": BIAS}))
    with pytest.raises(TorchchatError, match=r"no place for, such as 'blk\.0\.attn_sinks\.weight'"):
        build_model(checkpoint, torch.float32)


# ---- rotary scaling -----------------------------------------------------------------------------------------------


YARN = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 8}


@pytest.mark.parametrize(("changes", "wanted"), [
    ({".rope.scaling.factor": 4.0},  # linear in llama.cpp
     RopeScaling(kind="linear", factor=4.0, original_context=32)),
    ({".rope.scaling.type": "linear", ".rope.scaling.factor": 2.0},
     RopeScaling(kind="linear", factor=2.0, original_context=32)),
    ({".rope.scale_linear": 2.0},
     RopeScaling(kind="linear", factor=2.0, original_context=32)),
    ({".rope.scaling.type": "none", ".rope.scaling.factor": 2.0}, None),
    ({".rope.scaling.factor": 0.0}, None),
    (YARN, RopeScaling(kind="yarn", factor=4.0, original_context=8, attention_factor=1 + 0.1 * math.log(4))),
    ({**YARN, ".rope.scaling.yarn_beta_fast": 16.0, ".rope.scaling.yarn_beta_slow": 2.0},
     RopeScaling(kind="yarn", factor=4.0, original_context=8, beta_fast=16.0, beta_slow=2.0,
                 attention_factor=1 + 0.1 * math.log(4))),
    ({**YARN, ".rope.scaling.attn_factor": 0.5},
     RopeScaling(kind="yarn", factor=4.0, original_context=8, attention_factor=0.5 * (1 + 0.1 * math.log(4)))),
])
def test_rotary_scaling_is_that_of_the_keys(config: Callable[..., ModelConfig], changes: Mapping[str, Any],
                                            wanted: RopeScaling | None) -> None:
    assert config(changes).rope_scaling == wanted


@pytest.mark.parametrize(("changes", "context"), [
    ({".rope.scaling.factor": 4.0}, 128), ({**YARN, ".rope.scaling.original_context_length": 32}, 128), (YARN, 32),
    ({".rope.scaling.type": "none", ".rope.scaling.factor": 2.0}, 32),
])
def test_yarn_and_linear_scaling_lengthen_the_context(config: Callable[..., ModelConfig], changes: Mapping[str, Any],
                                                      context: int) -> None:
    assert config(changes).max_context == context


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 500000.0), (32.0, 500000.0), (16.0, 10000.0)])
def test_the_factors_of_llama_3_1_are_known_again(config: Callable[..., ModelConfig], factor: float,
                                                  theta: float) -> None:
    scaling = RopeScaling(kind="llama3", factor=factor, original_context=8192)
    shape = {"head_dim": 16, "rope_theta": theta}
    plain = rotary_frequencies(tiny_config(**shape), extended=False)
    factors = plain / rotary_frequencies(tiny_config(**shape, rope_scaling=scaling), extended=False)
    made = config({".rope.freq_base": theta}, {"rope_freqs.weight": numbers(factors.tolist())})
    assert made.rope_scaling == scaling


def test_other_factors_divide_the_frequencies(config: Callable[..., ModelConfig]) -> None:
    factors = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 100.0]
    made = config({".rope.scaling.factor": 2.0}, {"rope_freqs.weight": numbers(factors)})
    wanted = rotary_frequencies(config({}), extended=False) / (2 * torch.tensor(factors))
    for extended in (False, True):
        torch.testing.assert_close(rotary_frequencies(made, extended), wanted)
    assert rotary_amplitude(made.rope_scaling) == 1.0


def test_longrope_has_factors_for_short_and_for_long_sequences(config: Callable[..., ModelConfig]) -> None:
    keys = {".rope.scaling.type": "longrope", ".rope.scaling.attn_factor": 1.25,
            ".rope.scaling.original_context_length": 8}
    short, long = [1.0] * 8, [2.0] * 8
    made = config(keys, {"rope_factors_short.weight": numbers(short), "rope_factors_long.weight": numbers(long)})
    assert made.rope_scaling == RopeScaling(kind="longrope", original_context=8, attention_factor=1.25,
                                            short_factor=tuple(short), long_factor=tuple(long))


@pytest.mark.parametrize(("name", "factors", "message"), [
    ("rope_freqs.weight", [1.0] * 7, r"rope_freqs\.weight is \[7\] of F32"),
    ("rope_freqs.weight", [1.0] * 7 + [0.0], "holds a factor that is no positive number"),
    ("rope_freqs.weight", [1.0] * 7 + [math.inf], "holds a factor that is no positive number"),
    ("rope_factors_short.weight", [1.0] * 8, r"rope_factors_long\.weight is missing"),
])
def test_damaged_tables_of_factors_are_refused(config: Callable[..., ModelConfig], name: str, factors: list[float],
                                               message: str) -> None:
    with pytest.raises(TorchchatError, match=message):
        config({}, {name: numbers(factors)})


def test_canonical_names_are_those_of_hugging_face(testdata: Path) -> None:
    file = read_gguf(testdata / "tinyllamas" / "stories260K" / "stories260K.gguf")
    from safetensors import safe_open

    with safe_open(str(testdata / "hf" / "stories260K" / "model.safetensors"), framework="pt") as folder:
        assert {canonical_name(name) for name in file.tensors} - {"lm_head.weight"} == set(folder.keys()) - {
            "lm_head.weight"}
