"""LoRA adapters are merged as PEFT merges them, whatever order the checkpoint has, and bad ones are told apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rope_layout import interleaved_rows
from torchchat_core.models.weights import build_model
from torchchat_core.pipeline import ModelRequest, open_checkpoint
from torchchat_core.pipeline import fetch_files as fetch
from torchchat_core.plugins import Registry
from torchchat_core.sources.adapters import with_adapter
from torchchat_core.specs import Checkpoint, PackedTensor
from torchchat_core.testing.models import reference_logits, seeded, tiny_config

QUERY = "model.layers.1.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = list(range(1, 20))


class ModelCheckpoint:
    """The weights of a module as a checkpoint."""

    dtype = torch.float32

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self.weights = weights or {name: value.detach() for name, value in seeded(config).named_parameters()}

    def names(self) -> Iterable[str]:
        return self.weights

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.weights[name].to(dtype or self.dtype)


def as_meta_orders(checkpoint: Checkpoint) -> ModelCheckpoint:
    """The same model with the rows of queries and keys as Meta has them."""
    config = dataclasses.replace(checkpoint.config, rope_interleaved=True)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    return ModelCheckpoint(config, {
        name: interleaved_rows(value, heads[layer]) if (layer := name.split(".")[-2]) in heads else value
        for name, value in weights.items()})


def write_adapter(folder: Path, weights: Mapping[str, Tensor], prefix: str = "base_model.model.", **settings: Any
                  ) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}))
    save_file({f"{prefix}{name}": value.contiguous() for name, value in weights.items()},
              folder / "adapter_model.safetensors")
    return folder


def pair(name: str, outputs: int, inputs: int, rank: int = 4, a: str = "lora_A.weight", b: str = "lora_B.weight"
         ) -> dict[str, Tensor]:
    return {f"{name}.{a}": torch.randn(rank, inputs), f"{name}.{b}": torch.randn(outputs, rank)}


def product(weights: Mapping[str, Tensor]) -> Tensor:
    a, b = weights.values()
    return b @ a


# ---- against a merge by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "scale"), [
    ({}, 2.0),
    ({"use_rslora": True}, 4.0),
    ({"lora_alpha": 3}, 0.75),
    ({"alpha_pattern": {"q_proj": 2}}, 0.5),
    ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, 2.0),
    ({"r": 16, "rank_pattern": {r".*\.1\.self_attn\.(q|k)_proj": 4}}, 2.0),
])
def test_the_scale_is_that_of_the_settings(settings: dict[str, Any], scale: float, tmp_path: Path) -> None:
    base, weights = ModelCheckpoint(tiny_config()), pair(QUERY, 32, 32)
    merged = with_adapter(base, write_adapter(tmp_path, weights, **settings))
    expected = base.tensor(f"{QUERY}.weight") + scale * product(weights)
    torch.testing.assert_close(merged.tensor(f"{QUERY}.weight"), expected)
    other = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged.tensor(other), base.tensor(other))


def test_the_sum_is_formed_in_float32_and_given_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    base, weights = ModelCheckpoint(tiny_config()), pair(QUERY, 32, 32)
    merged = with_adapter(base, write_adapter(tmp_path, {name: each.bfloat16() for name, each in weights.items()}))
    rounded = {name: each.bfloat16().float() for name, each in weights.items()}
    expected = (base.tensor(f"{QUERY}.weight") + 2.0 * product(rounded)).bfloat16()
    assert torch.equal(merged.tensor(f"{QUERY}.weight", torch.bfloat16), expected)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_the_names_of_a_state_dict_are_known_too(prefix: str, infix: str, tmp_path: Path) -> None:
    base = ModelCheckpoint(tiny_config())
    weights = pair(QUERY, 32, 32, a=f"lora_A{infix}.weight", b=f"lora_B{infix}.weight")
    merged = with_adapter(base, write_adapter(tmp_path, weights, prefix))
    torch.testing.assert_close(merged.tensor(f"{QUERY}.weight"), base.tensor(f"{QUERY}.weight") + 2 * product(weights))


def test_a_pickled_adapter_is_read_as_well(tmp_path: Path) -> None:
    base, weights = ModelCheckpoint(tiny_config()), pair(QUERY, 32, 32)
    write_adapter(tmp_path, weights)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{name}": each for name, each in weights.items()}, tmp_path / "adapter_model.bin")
    merged = with_adapter(base, tmp_path)
    torch.testing.assert_close(merged.tensor(f"{QUERY}.weight"), base.tensor(f"{QUERY}.weight") + 2 * product(weights))


def test_whole_weights_replace_those_of_the_model(tmp_path: Path) -> None:
    base = ModelCheckpoint(tiny_config())
    weights = {HEAD: torch.randn(96, 32), "model.norm.weight": torch.randn(32),
               "model.embed_tokens.modules_to_save.default.weight": torch.randn(96, 32)}
    merged = with_adapter(base, write_adapter(tmp_path, weights, modules_to_save=["lm_head"]))
    for name, value in zip((HEAD, "model.norm.weight", EMBEDDING), weights.values(), strict=True):
        assert torch.equal(merged.tensor(name), value)


def test_a_whole_weight_that_peft_writes_under_three_names_is_the_trained_one(tmp_path: Path) -> None:
    trained = torch.randn(96, 32)
    write_adapter(tmp_path, {"lm_head.weight": trained, "lm_head.modules_to_save.weight": trained.clone(),
                             "lm_head.original_module.weight": torch.randn(96, 32)})
    assert torch.equal(with_adapter(ModelCheckpoint(tiny_config()), tmp_path).tensor(HEAD), trained)


def test_biases_are_replaced_and_added_to_where_the_model_has_them(tmp_path: Path) -> None:
    base = ModelCheckpoint(tiny_config(attention_bias=True))
    bias, addition = torch.randn(32), torch.randn(16)
    value = "model.layers.0.self_attn.v_proj"
    weights = {**pair(QUERY, 32, 32), f"{QUERY}.bias": bias, **pair(value, 16, 32), f"{value}.lora_B.bias": addition}
    merged = with_adapter(base, write_adapter(tmp_path, weights, bias="lora_only", lora_bias=True))
    assert torch.equal(merged.tensor(f"{QUERY}.bias"), bias)
    torch.testing.assert_close(merged.tensor(f"{value}.bias"), base.tensor(f"{value}.bias") + 2 * addition)


def test_a_changed_embedding_that_was_both_becomes_two(tmp_path: Path) -> None:
    base = ModelCheckpoint(tiny_config(tied_embeddings=True))
    merged = with_adapter(base, write_adapter(tmp_path / "head", pair("lm_head", 96, 32)))
    assert not merged.config.tied_embeddings
    assert HEAD in merged.names()
    assert torch.equal(merged.tensor(EMBEDDING), base.tensor(EMBEDDING))
    assert not torch.equal(merged.tensor(HEAD), base.tensor(EMBEDDING))
    tied = with_adapter(base, write_adapter(tmp_path / "tied", {EMBEDDING: torch.randn(96, 32)},
                                            ensure_weight_tying=True))
    assert tied.config.tied_embeddings


def test_packed_weights_stay_packed_where_the_adapter_leaves_them_alone(tmp_path: Path) -> None:
    class Packed(ModelCheckpoint):
        def packed(self, name: str) -> PackedTensor | None:
            return PackedTensor(kind="q8_0", shape=(32, 32), data=torch.zeros(32, 34, dtype=torch.uint8))

    merged: Any = with_adapter(Packed(tiny_config()), write_adapter(tmp_path, pair(QUERY, 32, 32)))
    assert merged.packed(f"{QUERY}.weight") is None
    assert merged.packed("model.layers.0.self_attn.q_proj.weight").kind == "q8_0"
    assert not hasattr(with_adapter(ModelCheckpoint(tiny_config()), tmp_path), "packed")


def test_an_adapter_goes_onto_a_quantised_gguf_file(testdata: Path, tmp_path: Path,
                                                    isolated_registry: Registry) -> None:
    isolated_registry.add(pytest.importorskip("tc_gguf"), "tc_gguf", "tc-gguf", "0")
    plain = ModelRequest(model=str(testdata / "gguf/synth256-Q8_0.gguf"))
    base = open_checkpoint(plain, fetch(plain, isolated_registry), isolated_registry)
    config, weights = base.config, pair(QUERY, base.config.num_heads * base.config.head_dim, base.config.hidden_size)
    write_adapter(tmp_path / "adapter", weights)
    request = dataclasses.replace(plain, adapter=str(tmp_path / "adapter"))
    merged: Any = open_checkpoint(request, fetch(request, isolated_registry), isolated_registry)
    a, b = weights.values()
    rows = interleaved_rows(b, config.num_heads) if config.rope_interleaved else b
    name = f"{QUERY}.weight"
    expected = base.tensor(name, torch.float32) + 2 * rows @ a
    torch.testing.assert_close(merged.tensor(name, torch.float32), expected)
    assert merged.packed(name) is None
    assert merged.packed("model.layers.0.self_attn.q_proj.weight") is not None


# ---- against PEFT -------------------------------------------------------------------------------------------------


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": [*ALL_LINEAR, "lm_head"]},
    "input embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "rslora": {"target_modules": ALL_LINEAR, "use_rslora": True},
    "patterns": {"target_modules": ALL_LINEAR, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
                 "alpha_pattern": {"down_proj": 32}},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "fan in, fan out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
}


def make_transformers_model(folder: Path, kind: str, tied: bool) -> Any:
    """A tiny model of transformers with random weights, saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**sizes, tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def make_peft_adapter(model: Any, folder: Path, settings: dict[str, Any]) -> Any:
    """An adapter of PEFT with random weights for the model, saved in `folder`; the model with it, in float32."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2).abs_() if "magnitude" in name else parameter.data.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


def transformers_logits(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["Llama", "Qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_is_pefts(kind: str, model: str, tmp_path: Path, isolated_registry: Registry) -> None:
    made = make_transformers_model(tmp_path / "model", model, tied=False)
    adapted = make_peft_adapter(made, tmp_path / "adapter", KINDS[kind])
    request = ModelRequest(model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    merged = open_checkpoint(request, fetch(request, isolated_registry), isolated_registry)
    base = open_checkpoint(dataclasses.replace(request, adapter=None), fetch(request, isolated_registry),
                           isolated_registry)
    meta = with_adapter(as_meta_orders(base), tmp_path / "adapter")
    for expected in (transformers_logits(adapted), transformers_logits(adapted.merge_and_unload())):
        for ours in (merged, meta):
            torch.testing.assert_close(reference_logits(build_model(ours, torch.float32), IDS), expected,
                                       rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_with_tied_embeddings_the_model_computes_as_peft_does_before_merging(
        targets: list[str], tmp_path: Path, isolated_registry: Registry) -> None:
    made = make_transformers_model(tmp_path / "model", "Llama", tied=True)
    adapted = make_peft_adapter(made, tmp_path / "adapter", {"target_modules": targets})
    request = ModelRequest(model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    merged = open_checkpoint(request, fetch(request, isolated_registry), isolated_registry)
    torch.testing.assert_close(reference_logits(build_model(merged, torch.float32), IDS), transformers_logits(adapted),
                               rtol=1e-4, atol=1e-4)


# ---- bad adapters -------------------------------------------------------------------------------------------------


def dora(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_magnitude_vector": torch.ones(5)}


@pytest.mark.parametrize(("settings", "message"), [
    ({"peft_type": "IA3"}, "of the kind 'IA3'"),
    ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING'"),
    ({"peft_type": ["LORA"]}, "of the kind ['LORA']"),
    ({"init_lora_weights": "pissa_niter_4"}, "began as 'pissa_niter_4'"),
    ({"layer_replication": [[0, 1]]}, "has layer_replication set"),
    ({"use_dora": True}, "no lora_magnitude_vector for 'model.layers.1.self_attn.q_proj.weight'"),
    ({"use_dora": "yes"}, "use_dora is 'yes'"),
    ({"r": 0}, "r is 0"),
    ({"r": 8}, "has the shape [4, 32]; the model and the adapter's rank 8 ask for [8, 32]"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": 1e308}, "lora_alpha is 1e+308"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is None"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
    ({"rank_pattern": {"((": 4}}, "rank_pattern has the pattern '(('"),
    ({"rank_pattern": {"(a+)+b": 4}}, "which is too complex"),
])
def test_settings_that_cannot_be_merged_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, pair(QUERY, 32, 32), **settings)
    with pytest.raises(TorchchatError) as raised:
        with_adapter(ModelCheckpoint(tiny_config()), tmp_path)
    assert message in raised.value.message


@pytest.mark.parametrize(("weights", "message"), [
    (pair("model.layers.2.self_attn.q_proj", 32, 32), "changes 'model.layers.2.self_attn.q_proj.weight', which"),
    (pair("model.layers.0.self_attn.qkv_proj", 32, 32), "changes 'model.layers.0.self_attn.qkv_proj.weight'"),
    (pair(QUERY, 32, 48), "has the shape [4, 48]; the model and the adapter's rank 4 ask for [4, 32]"),
    (pair(QUERY, 48, 32), "has the shape [48, 4]"),
    (pair(QUERY, 32, 32) | {f"{QUERY}.hada_w1_a": torch.ones(3)}, "'base_model.model." + QUERY + ".hada_w1_a'"),
    (pair(QUERY, 32, 32) | {f"{QUERY}.bias": torch.ones(32)}, "changes '" + QUERY + ".bias', which"),
    (pair(QUERY, 32, 32) | {f"{QUERY}.lora_A.default.weight": torch.ones(4, 32)}, "twice"),
    (pair(QUERY, 32, 32) | dora(QUERY), "magnitudes for 'model.layers.1.self_attn.q_proj.weight' have the shape [5]"),
    ({f"{QUERY}.lora_A.weight": torch.ones(4, 32)}, "only one of the two matrices"),
    (pair("model.norm", 32, 32), "matrices for 'model.norm.weight', which is none"),
    (pair("model.embed_tokens", 32, 96, a="lora_embedding_A", b="lora_embedding_B") | dora("model.embed_tokens"),
     "by DoRA"),
    ({HEAD: torch.ones(97, 32)}, "lm_head.weight has 97 tokens, but the model has 96"),
    ({HEAD: torch.ones(96, 31)}, "for 'lm_head.weight' has the shape [96, 31]"),
    ({f"{name}{part}.weight": torch.full((101, 32), 2.0)  # as PEFT writes resized embeddings that were trained
      for name in ("lm_head", "model.embed_tokens") for part in ("", ".modules_to_save", ".original_module")},
     "model.embed_tokens.weight has 101 tokens, but the model has 96"),
    (pair("model.embed_tokens", 32, 99, a="lora_embedding_A", b="lora_embedding_B"), "has 99 tokens"),
    (pair("lm_head", 95, 32), "lm_head.weight has 95 tokens"),
    ({HEAD: torch.ones(96, 32), "lm_head.modules_to_save.weight": torch.zeros(96, 32)}, "twice, under two names"),
    ({}, "holds no weights"),
])
def test_weights_that_do_not_fit_are_named(weights: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, weights)
    with pytest.raises(TorchchatError) as raised:
        with_adapter(ModelCheckpoint(tiny_config()), tmp_path)
    assert message in raised.value.message


@pytest.mark.parametrize(("change", "message"), [
    (lambda matrix: matrix * torch.nan, "no finite numbers"),
    (lambda matrix: matrix.int(), "is of int32; floating point is needed"),
    (lambda matrix: matrix > 0, "is of bool"),
    (lambda matrix: matrix.to(torch.complex64), "is of complex64"),
])
def test_matrices_that_are_no_numbers_are_named(change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
                                                ) -> None:
    weights = pair(QUERY, 32, 32)
    torch.save({f"base_model.model.{name}": change(matrix) for name, matrix in weights.items()},
               write_adapter(tmp_path, weights) / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(TorchchatError, match=message):
        with_adapter(ModelCheckpoint(tiny_config()), tmp_path).tensor(f"{QUERY}.weight")


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a JSON list"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 50), "as safetensors"),
])
def test_folders_that_hold_no_adapter_are_named(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(write_adapter(tmp_path, pair(QUERY, 32, 32)))
    with pytest.raises(TorchchatError) as raised:
        with_adapter(ModelCheckpoint(tiny_config()), tmp_path)
    assert message in raised.value.message


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TorchchatError, match="there is no file or folder"):
        with_adapter(ModelCheckpoint(tiny_config()), tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(TorchchatError, match="is a file"):
        with_adapter(ModelCheckpoint(tiny_config()), tmp_path / "file")
