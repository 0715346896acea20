"""Every layout opens to the same model, and every damaged file is an error that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tc_eager.executor import EagerExecutor
from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import build_model
from torchchat_core.sources import containers
from torchchat_core.sources.checkpoints import open_checkpoint
from torchchat_core.sources.local import LocalSource
from torchchat_core.specs import LoadRequest, ModelFiles, ModelRef

SIZES = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}


def files_at(path: Path) -> ModelFiles:
    return LocalSource().fetch(ModelRef(text=str(path), scheme="file", location=str(path)))


def logits(path: Path) -> torch.Tensor:
    module = build_model(open_checkpoint(files_at(path)), torch.float32)
    return EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module)).session().score(TOKENS)


def meta_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Meta's names, and the rows of queries and keys in Meta's order of rotary pairs."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor.view(-1, 2, 4, 32).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in META_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor.clone()
    return renamed


def split_parallel(state: dict[str, torch.Tensor], parts: int,
                   embedding_axis: int) -> Iterator[dict[str, torch.Tensor]]:
    """Meta's files for so many processes."""

    def part(name: str, tensor: torch.Tensor, index: int) -> torch.Tensor:
        if tensor.ndim == 1:
            return tensor
        by_column = name.endswith(("wo.weight", "w2.weight"))
        axis = embedding_axis if name.startswith("tok_") else 1 if by_column else 0
        return tensor.chunk(parts, axis)[index].clone()

    for index in range(parts):
        yield {name: part(name, tensor, index) for name, tensor in state.items()}


@pytest.fixture
def state(make_tiny_model: Callable[..., Transformer]) -> dict[str, torch.Tensor]:
    return dict(make_tiny_model().state_dict())


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face folder with one safetensors file."""
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


@pytest.fixture
def expected(folder: Path) -> torch.Tensor:
    return logits(folder)


def write_layout(kind: str, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """One of the known layouts in `folder`; the path to open."""
    config, meta = folder / "config.json", meta_layout(state)
    names = sorted(state)
    halves = [{name: state[name] for name in part} for part in (names[::2], names[1::2])]
    folder.mkdir(exist_ok=True)
    if kind in ("hf", "hf shards", "hf bin", "hf bin shards", "torchtune hf"):
        config.write_text(json.dumps(SIZES))
    elif kind != "llama2.c":
        (folder / "params.json").write_text(json.dumps(PARAMS))
    if kind in ("hf shards", "hf bin shards"):
        stem, suffix = ("model", "safetensors") if kind == "hf shards" else ("pytorch_model", "bin")
        files = [f"{stem}-0000{index}-of-00002.{suffix}" for index in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            (save_file if suffix == "safetensors" else torch.save)(half, folder / file)
        places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    elif kind == "hf":
        save_file(state, folder / "model.safetensors")
    elif kind == "hf bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "torchtune hf":
        for index, half in enumerate(halves, 1):
            torch.save({name: torch.zeros_like(tensor) for name, tensor in half.items()},
                       folder / f"hf_model_000{index}_0.pt")
            torch.save(half, folder / f"hf_model_000{index}_1.pt")
    elif kind == "torchtune meta":
        torch.save(meta, folder / "meta_model_0.pt")
    elif kind == "meta file":
        torch.save(meta, folder / "whatever.pth")
        return folder / "whatever.pth"
    elif kind == "legacy pickle":
        torch.save(meta, folder / "old.pt", _use_new_zipfile_serialization=False)
    elif kind == "llama2.c":
        wrapped = {f"_orig_mod.{name}": tensor for name, tensor in meta.items()}
        torch.save({"model": wrapped, "model_args": {**PARAMS, "vocab_size": 96, "max_seq_len": 64, "multiple_of": 4},
                    "iter_num": 3}, folder / "ckpt.pt")
    else:
        parts, axis = {"meta": (1, 0), "meta in two parts, as Llama 2": (2, 1),
                       "meta in two parts, as Llama 3": (2, 0)}[kind]
        for index, part in enumerate(split_parallel(meta, parts, axis)):
            torch.save(part, folder / f"consolidated.0{index}.pth")
    return folder


@pytest.mark.parametrize("kind", [
    "hf shards", "hf bin", "hf bin shards", "torchtune hf", "torchtune meta", "meta", "meta in two parts, as Llama 2",
    "meta in two parts, as Llama 3", "meta file", "legacy pickle", "llama2.c",
])
def test_every_layout_gives_the_same_logits(kind: str, state: dict[str, torch.Tensor], expected: torch.Tensor,
                                            tmp_path: Path) -> None:
    path = write_layout(kind, tmp_path / "other", state)
    torch.testing.assert_close(logits(path), expected, atol=1e-5, rtol=1e-5)


def test_old_names_without_the_model_prefix_are_known(folder: Path, expected: torch.Tensor,
                                                      state: dict[str, torch.Tensor]) -> None:
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_a_stored_rotary_table_is_not_a_weight(folder: Path, expected: torch.Tensor,
                                               state: dict[str, torch.Tensor]) -> None:
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("kind", ["hf", "hf bin", "hf shards"])
def test_different_matrices_are_not_tied_even_if_the_config_says_so(
        kind: str, state: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(write_layout(kind, tmp_path / "untied", state))
    path = write_layout(kind, tmp_path / "tied", state)
    (path / "config.json").write_text(json.dumps({**SIZES, "tie_word_embeddings": True}))
    torch.testing.assert_close(logits(path), expected)
    assert "two different matrices" in caplog.text


def test_two_equal_matrices_are_tied(state: dict[str, torch.Tensor], tmp_path: Path,
                                     caplog: pytest.LogCaptureFixture) -> None:
    embedding = state["model.embed_tokens.weight"]
    path = write_layout("hf bin", tmp_path, {**state, "lm_head.weight": embedding.clone()})
    (path / "config.json").write_text(json.dumps({**SIZES, "tie_word_embeddings": True}))
    assert open_checkpoint(files_at(path)).config.tied_embeddings
    assert not caplog.text


def test_reading_in_windows_gives_the_same_tensors(folder: Path, expected: torch.Tensor,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers.MappedFile, "WINDOW", 1)
    assert torch.equal(logits(folder), expected)


def test_weights_of_the_wanted_dtype_stay_mapped(folder: Path) -> None:
    """The module's memory is the file's: what the file says is what the module says."""
    module = build_model(open_checkpoint(files_at(folder)), torch.float32)
    with Path("/proc/self/maps").open() as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if "model.safetensors" in line]
    address = module.lm_head.weight.data_ptr()
    assert any(start <= address < end for start, end in ranges)


@pytest.mark.parametrize(("file", "params", "vocab_size"), [
    ("demo_rand_params.pth", {"dim": 64, "multiple_of": 4, "n_heads": 8, "n_layers": 5, "norm_eps": 1e-5}, 512),
    ("tiny_fair_checkpoint.pt", {"dim": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-5, "max_seq_len": 64}, 500),
])
def test_meta_files_of_other_projects_open(testdata: Path, tmp_path: Path, file: str, params: dict[str, Any],
                                           vocab_size: int) -> None:
    shutil.copy(testdata / "checkpoints" / file, tmp_path / f"model{Path(file).suffix}")
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert logits(tmp_path).shape == (len(TOKENS), vocab_size)
    assert torch.isfinite(logits(tmp_path)).all()


# ---- what is damaged or hostile -----------------------------------------------------------------------------------


def message_of(action: Callable[[], Any]) -> str:
    with pytest.raises(TorchchatError) as caught:
        action()
    return str(caught.value)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")
    assert "no tensor 'model.layers.1.mlp.up_proj.weight'" in message_of(lambda: logits(folder))


def test_a_wrong_shape_is_told_with_both_shapes(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**SIZES, "intermediate_size": 40}))
    assert "has the shape [48, 32]; the config asks for [40, 32]" in message_of(lambda: logits(folder))


def test_a_tensor_without_a_place_is_told(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": 1}))
    assert "has 9 tensors that a llama model with 1 layers has no place for" in message_of(lambda: logits(folder))


def test_integer_weights_are_not_taken_for_floating_point(folder: Path, state: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: state[name].to(torch.int8)}, folder / "model.safetensors")
    assert f"tensor {name!r} is of int8" in message_of(lambda: logits(folder))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt"])
def test_a_truncated_file_is_told(folder: Path, state: dict[str, torch.Tensor], name: str, keep: int) -> None:
    if name == "ckpt.pt":
        torch.save(state, folder / name)
        (folder / "model.safetensors").unlink()
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or incomplete" in message_of(lambda: logits(folder))


def test_a_safetensors_header_that_claims_too_much_is_told(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "cannot read" in message_of(lambda: logits(folder))


def test_a_pickle_with_code_is_refused_and_not_run(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "owned"),)

    for legacy in (False, True):
        torch.save({"tok_embeddings.weight": Hostile()}, folder / "model.pt", _use_new_zipfile_serialization=not legacy)
        assert "run code from the file, so it was refused" in message_of(lambda: logits(folder / "model.pt"))
    assert not (folder / "owned").exists()


def test_an_index_cannot_point_out_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "outside its own folder" in message_of(lambda: logits(folder))


def test_an_index_that_names_a_missing_shard_is_told(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert "names 'model-2.safetensors', which is not in" in message_of(lambda: logits(folder))


@pytest.mark.parametrize(("content", "message"), [
    ("", "is empty"),
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "it has to be an object"),
    (json.dumps({**SIZES, "model_type": "lama"}), "unknown architecture 'lama'.*known are llama, "),
    (json.dumps({**SIZES, "model_type": None}), "names no architecture"),
    (json.dumps({**SIZES, "model_type": ["llama"]}), "unknown architecture .'llama'."),
    (json.dumps({**SIZES, "hidden_size": "big"}), "hidden_size is 'big'"),
    (json.dumps({**SIZES, "num_hidden_layers": 10**9}), "num_layers is 1000000000"),
    (json.dumps({**SIZES, "vocab_size": -5}), "vocab_size is -5"),
    (json.dumps({**SIZES, "num_attention_heads": 0}), "num_heads is 0"),
    (json.dumps({**SIZES, "num_key_value_heads": 3}), "not a multiple of num_kv_heads 3"),
    (json.dumps({**SIZES, "rms_norm_eps": float("nan")}), "rms_norm_eps is nan"),
    (json.dumps({**SIZES, "rope_scaling": {"type": "magic"}}), "unknown rope scaling 'magic'"),
    (json.dumps({**SIZES, "rope_scaling": {"type": "linear"}}), "factor is None"),
    (json.dumps({**SIZES, "rope_scaling": "linear"}), "rope_scaling is 'linear'"),
    (json.dumps({**SIZES, "hidden_act": "gelu"}), "hidden_act is 'gelu'"),
    (json.dumps({**SIZES, "rope_parameters": [1]}), "rope_parameters is .1.; it has to be an object"),
    (json.dumps({**SIZES, "rope_scaling": {"type": "linear", "factor": 0}}), "factor is 0.0"),
    (json.dumps({**SIZES, "rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}), "beta_fast is 0.0"),
    (json.dumps({**SIZES, "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": -1}}),
     "original_max_position_embeddings is -1"),
    (json.dumps({**SIZES, "rope_theta": 1}), "rope_theta is 1.0"),
    (json.dumps({**SIZES, "tie_word_embeddings": "false"}), "tie_word_embeddings is 'false'"),
    (json.dumps({**SIZES, "model_type": "granite", "logits_scaling": 0}), "logits_divisor is 0.0"),
    (json.dumps({**SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
                 "num_hidden_layers": 10**9}), "num_hidden_layers is 1000000000"),
    (json.dumps({**SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": 5}),
     "layer_types is 5"),
    (json.dumps({**SIZES, "hidden_size": 1 << 24, "head_dim": 1 << 24}), "hidden_size is 16777216"),
])
def test_a_wrong_config_is_told(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(TorchchatError, match=message):
        logits(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2_moe", "mixtral", "bert"])
def test_an_unsupported_architecture_is_named_before_its_tensors_are_read(folder: Path, model_type: str) -> None:
    save_file({"transformer.wte.weight": torch.ones(4, 4), "layers.0.scale": torch.ones(4)},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "n_embd": 4}))
    with pytest.raises(TorchchatError, match=f"unknown architecture '{model_type}'") as caught:
        logits(folder)
    assert "did you mean" not in str(caught.value)


QUANTIZED = {
    "FP8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, {"weight_scale_inv": 1}),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"qweight": 4, "qzeros": 1, "weight": 0}),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {"qweight": 4, "scales": 1, "weight": 0}),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}},
                     {"weight.absmax": 1, "weight.quant_state.bitsandbytes__nf4": 1}),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
            {"scales": 1, "biases": 1, "weight": 4}),
    "compressed-tensors": ({"compression_config": {"format": "pack-quantized"}}, {"weight_packed": 4, "weight": 0}),
    "'never_heard_of'": ({"quantization_config": {"quant_method": "never_heard_of"}}, {"code_book": 3}),
    "an unnamed method": ({"quantization_config": True}, {"weight_scale": 1}),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_weights_that_another_program_quantized_are_named_by_its_method(
        method: str, folder: Path, state: dict[str, torch.Tensor]) -> None:
    fields, parts = QUANTIZED[method]
    layer = "model.layers.0.mlp.up_proj"
    changed = {f"{layer}.{part}": torch.ones(48, width, dtype=torch.int32) for part, width in parts.items() if width}
    dropped = {f"{layer}.{part}" for part, width in parts.items() if not width}
    save_file({name: tensor for name, tensor in {**state, **changed}.items() if name not in dropped},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SIZES, **fields}))
    message = message_of(lambda: logits(folder))
    assert f"quantized with {method}" in message
    assert "GGUF" in message


def test_plain_weights_are_read_even_if_config_json_names_a_quantization_method(
        folder: Path, expected: torch.Tensor) -> None:
    (folder / "config.json").write_text(json.dumps({**SIZES, "quantization_config": {"quant_method": "fp8"}}))
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_safetensors_type_that_pytorch_cannot_convert_is_named(
        kind: str, folder: Path, state: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    begin = header[name]["data_offsets"][0]
    tail = 48 * 32 * (4 if kind == "F4" else 6) // 8
    moved = header[name]["data_offsets"][1] - begin - tail
    header[name] = {"dtype": kind, "shape": [48, 32], "data_offsets": [begin, begin + tail]}
    for other, entry in header.items():
        if other != "__metadata__" and entry["data_offsets"][0] > begin:
            entry["data_offsets"] = [offset - moved for offset in entry["data_offsets"]]
    data = raw[8 + size :]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[: begin + tail] + data[begin + tail + moved :])
    message = message_of(lambda: logits(folder))
    assert f"cannot read the tensor '{name}' of model.safetensors" in message


def test_shards_that_do_not_belong_together_are_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    write_layout("meta in two parts, as Llama 2", tmp_path, state)
    part = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    del part["layers.0.attention.wq.weight"]
    torch.save(part, tmp_path / "consolidated.01.pth")
    assert "'layers.0.attention.wq.weight' is not in all of them" in message_of(lambda: logits(tmp_path))


def test_weights_without_a_config_say_which_file_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "there is no config.json beside model.safetensors" in message_of(lambda: logits(folder))


def test_two_checkpoints_in_one_folder_are_not_chosen_between(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(meta_layout(state), folder / "meta_model_0.pt")
    assert "holds several checkpoints: model.safetensors (safetensors) and meta_model_0.pt (torchtune)" in message_of(
        lambda: files_at(folder))


def test_an_empty_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    assert "holds no checkpoint" in message_of(lambda: files_at(tmp_path))


def test_a_state_dictionary_of_something_else_is_told(folder: Path) -> None:
    save_file({"conv1.weight": torch.ones(3)}, folder / "model.safetensors")
    assert "holds no language model that torchchat knows" in message_of(lambda: logits(folder))


def test_a_missing_embedding_is_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, folder / "model.safetensors")
    assert "no tensor 'model.embed_tokens.weight'" in message_of(lambda: open_checkpoint(files_at(folder)).dtype)


def test_parts_of_a_matrix_that_do_not_fit_together_are_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    write_layout("meta in two parts, as Llama 2", tmp_path, state)
    part = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    for name, changed in {"layers.0.attention.wq.weight": torch.ones(3, 32), "output.weight": None}.items():
        odd = {**part, name: part[name].to(torch.bfloat16) if changed is None else changed}
        torch.save(odd, tmp_path / "consolidated.01.pth")
        assert f"do not belong together: {name!r} has" in message_of(lambda: logits(tmp_path))


def test_tensors_that_are_not_dense_are_refused(folder: Path, state: dict[str, torch.Tensor]) -> None:
    for odd in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        torch.save({**state, "model.norm.weight": odd}, folder / "odd.pt")
        message = message_of(lambda: logits(folder / "odd.pt"))
        assert "'model.norm.weight' in odd.pt is no ordinary dense tensor" in message


def test_files_of_different_models_are_not_mixed(folder: Path, state: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert "is in two of the files a.safetensors, b.safetensors" in message_of(lambda: logits(folder))


def test_an_optimizer_beside_the_weights_is_no_model(folder: Path, expected: torch.Tensor) -> None:
    torch.save({"step": 1}, folder / "optimizer.pt")
    assert torch.equal(logits(folder), expected)


def test_metas_names_take_metas_parameters_where_a_folder_has_both(folder: Path, state: dict[str, torch.Tensor],
                                                                   expected: torch.Tensor) -> None:
    torch.save(meta_layout(state), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    torch.testing.assert_close(logits(folder / "consolidated.00.pth"), expected, atol=1e-5, rtol=1e-5)


def test_a_mixture_of_experts_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    write_layout("meta", tmp_path, state)
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "moe": {"num_experts": 8}}))
    assert "mixture of experts" in message_of(lambda: logits(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_called_that(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    assert "Permission denied" in message_of(lambda: logits(folder))


def test_a_link_into_the_void_and_an_unknown_home_are_told(tmp_path: Path) -> None:
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nothing")
    assert "which does not exist" in message_of(lambda: files_at(tmp_path / "dangling.pt"))
    assert "the home folder in '~nobody-of-that-name/x' cannot be found" in message_of(
        lambda: LocalSource().fetch(ModelRef(text="x", scheme="file", location="~nobody-of-that-name/x")))
