"""`torchchat convert` as a person meets it: any model, and the original's way with torchtune's checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchchat_core import products
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rope_layout import half_split_rows
from torchchat_core.models.weights import build_model, weight_shapes
from torchchat_core.plugins import Registry
from torchchat_core.sources import torchtune
from torchchat_core.sources.local import LocalSource
from torchchat_core.specs import Checkpoint, ModelRef
from torchchat_core.testing.models import reference_logits, tiny_config

IDS = [1, 5, 9, 2, 6, 5, 3, 5]
STORIES = "tinyllamas/stories260K/stories260K.pt"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_registry: Registry) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(path: Path) -> Checkpoint:
    return LocalSource().open(LocalSource().fetch(ModelRef(text=str(path), scheme="file", location=str(path))))


def logits(checkpoint: Checkpoint) -> Tensor:
    return reference_logits(build_model(checkpoint, torch.float32), IDS)


# ---- a MODEL ------------------------------------------------------------------------------------------------------


def test_a_model_becomes_a_folder_that_says_the_same(testdata: Path, tmp_path: Path, torchchat: Any) -> None:
    done = torchchat("convert", testdata / STORIES, "--output-dir", tmp_path / "out")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n")
    said = [torchchat("generate", model, "--temperature", 0, "--max-new-tokens", 30, "-d", "fp32").out
            for model in (testdata / STORIES, tmp_path / "out")]
    assert said[0] == said[1] != ""


def test_the_folder_is_remembered_as_made_of_the_model(testdata: Path, tmp_path: Path, torchchat: Any) -> None:
    torchchat("convert", testdata / STORIES, "-o", tmp_path / "out", "-d", "bf16")
    made = products.products()[-1]
    assert (made.kind, made.path, made.detail) == ("converted", str(tmp_path / "out"), "bf16")
    assert made.reference == f"file:{testdata / STORIES}"


@pytest.mark.parametrize(("flag", "dtype"), [([], "F32"), (["-d", "bf16"], "BF16"), (["--dtype", "half"], "F16")])
def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(flag: list[str], dtype: str, testdata: Path, tmp_path: Path,
                                                           torchchat: Any) -> None:
    assert torchchat("convert", testdata / STORIES, "-o", tmp_path / "out", *flag).code == 0
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    tensors = json.loads(header[8:8 + int.from_bytes(header[:8], "little")])
    assert {entry["dtype"] for name, entry in tensors.items() if name != "__metadata__"} == {dtype}


def test_an_adapter_is_merged_into_what_is_written(testdata: Path, tmp_path: Path, torchchat: Any) -> None:
    adapter, layer = tmp_path / "adapter", "model.layers.0.mlp.up_proj"
    adapter.mkdir()
    a, b = torch.randn(2, 64), torch.randn(172, 2)
    save_file({f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b},
              adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    source = testdata / "hf/stories260K"
    assert torchchat("convert", source, "--adapter", adapter, "-o", tmp_path / "out").code == 0
    plain, merged = (load_file(place / "model.safetensors")[f"{layer}.weight"] for place in (source, tmp_path / "out"))
    torch.testing.assert_close(merged, plain + 0.5 * b @ a)


def test_a_tokenizer_and_sizes_from_elsewhere_are_taken(testdata: Path, tmp_path: Path, torchchat: Any) -> None:
    shutil.copy(testdata / "checkpoints/demo_rand_params.pth", tmp_path / "demo.pth")
    done = torchchat("convert", tmp_path / "demo.pth", "-o", tmp_path / "out",
                     "--params-path", testdata / "checkpoints/demo_config.json",
                     "--tokenizer-path", testdata / "hf/stories260K/tokenizer.model")
    assert (done.code, "notice" in done.err) == (0, False)
    assert torchchat("generate", tmp_path / "out", "--max-new-tokens", 3).code == 0


# ---- torchtune ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fine_tuned(testdata: Path, tmp_path: Path) -> Path:
    """The folder that torchtune's recipes leave: Meta's weights, the original's params.json, a tokenizer."""
    folder = tmp_path / "Meta-Llama-3-8B"
    (folder / "original").mkdir(parents=True)
    shutil.copy(testdata / "checkpoints/demo_rand_params.pth", folder / "meta_model_0.pt")
    shutil.copy(testdata / "checkpoints/demo_config.json", folder / "original" / "params.json")
    shutil.copy(testdata / "hf/stories260K/tokenizer.model", folder / "original" / "tokenizer.model")
    return folder


def test_a_fine_tuned_model_of_torchtune_runs_in_two_commands(fine_tuned: Path, torchchat: Any) -> None:
    done = torchchat("convert", "--checkpoint-dir", fine_tuned, "--checkpoint-files", "meta_model_0.pt",
                     "--checkpoint-format", "meta")
    assert (done.code, done.out) == (0, f"{fine_tuned / 'converted'}\n")
    torch.testing.assert_close(logits(opened(fine_tuned / "converted")), logits(opened(fine_tuned / "meta_model_0.pt")),
                               rtol=0, atol=1e-4)
    said = torchchat("generate", fine_tuned / "converted", "--prompt", "Once", "--max-new-tokens", 4, "--device", "cpu")
    assert said.code == 0
    assert said.out.startswith("Once")


def test_a_config_json_beside_metas_weights_gives_the_sizes_too(fine_tuned: Path, torchchat: Any) -> None:
    expected = logits(opened(fine_tuned / "meta_model_0.pt"))
    assert torchchat("convert", fine_tuned / "meta_model_0.pt", "-o", fine_tuned / "hf").code == 0
    shutil.rmtree(fine_tuned / "original")
    shutil.copy(fine_tuned / "hf" / "config.json", fine_tuned / "config.json")
    assert torchchat("convert", "--checkpoint-dir", fine_tuned).code == 0
    torch.testing.assert_close(logits(opened(fine_tuned / "converted")), expected, rtol=0, atol=1e-4)


TUNE_NAMES = {value: key for key, value in torchtune._LAYER.items()}
TUNE_TOP = {value: key for key, value in torchtune._TOP.items()}


def with_torchtunes_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        kind = "scale" if "norm" in stem and kind == "weight" else kind
        if stem in TUNE_TOP:
            return f"{TUNE_TOP[stem]}.{kind}"
        _, _, layer, inner = stem.split(".", 3)
        return f"layers.{layer}.{TUNE_NAMES[inner]}.{kind}"

    return {renamed(name): tensor for name, tensor in weights.items()}


@pytest.fixture
def tiny_builder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelConfig]:
    """Gives torchtune a builder `llama3_8b` of a tiny model."""

    def build(**changes: Any) -> ModelConfig:
        config = tiny_config(**changes)
        monkeypatch.setitem(torchtune._BUILDERS, "llama3_8b", config)
        return config

    return build


def write_torchtune(folder: Path, model: Any) -> Path:
    folder.mkdir()
    torch.save(with_torchtunes_names(dict(model.named_parameters())), folder / "torchtune_model_0.pt")
    return folder


@pytest.mark.parametrize("changes", [
    {}, {"tied_embeddings": True}, {"architecture": "qwen2", "attention_bias": True},
    {"architecture": "qwen3", "qk_norm": True},
])
def test_torchtunes_own_format_takes_its_sizes_from_the_models_name(
        changes: dict[str, Any], tmp_path: Path, torchchat: Any, tiny_builder: Any, make_tiny_model: Any) -> None:
    tiny_builder(**changes)
    qwen = "architecture" in changes
    model = make_tiny_model(**changes, rope_interleaved=not qwen)  # torchtune leaves Qwen's pairs as they are
    folder = write_torchtune(tmp_path / "tune", model)
    done = torchchat("convert", "--checkpoint-dir", folder, "--checkpoint-files", "torchtune_model_0.pt",
                     "--model-name", "llama3_8B", "--checkpoint-format", "torchtune")
    assert done.code == 0
    assert "no tokenizer was found" in done.err
    torch.testing.assert_close(logits(opened(folder / "converted")), reference_logits(model, IDS), rtol=0, atol=1e-4)


def test_hugging_faces_format_in_several_files_is_read_together(tmp_path: Path, torchchat: Any, tiny_builder: Any,
                                                                make_tiny_model: Any) -> None:
    tiny_builder()
    model, folder = make_tiny_model(), tmp_path / "tune"
    folder.mkdir()
    weights = list(dict(model.named_parameters()).items())
    torch.save(dict(weights[:7]), folder / "hf_model_0001_0.pt")
    torch.save(dict(weights[7:]), folder / "hf_model_0002_0.pt")
    done = torchchat("convert", "--checkpoint-dir", folder, "--checkpoint-files", "hf_model_0001_0.pt",
                     "hf_model_0002_0.pt", "--model-name", "llama3_8B", "--checkpoint-format", "hf")
    assert done.code == 0
    torch.testing.assert_close(logits(opened(folder / "converted")), reference_logits(model, IDS), rtol=0, atol=1e-4)


PARAMETERS = {  # in thousand millions, as published
    "llama2_7b": 6.738, "llama2_13b": 13.016, "llama2_70b": 68.977, "code_llama2_7b": 6.738, "code_llama2_13b": 13.016,
    "code_llama2_70b": 68.977, "llama3_8b": 8.030, "llama3_70b": 70.554, "llama3_1_8b": 8.030, "llama3_1_70b": 70.554,
    "llama3_1_405b": 405.853, "llama3_2_1b": 1.236, "llama3_2_3b": 3.213, "llama3_3_70b": 70.554, "mistral_7b": 7.242,
    "qwen2_0_5b": 0.494, "qwen2_1_5b": 1.544, "qwen2_7b": 7.616,
}


def test_every_builder_of_torchtune_has_as_many_parameters_as_the_model() -> None:
    counts = {name: sum(map(math.prod, weight_shapes(config).values())) / 1e9
              for name, config in torchtune._BUILDERS.items()}
    assert counts == pytest.approx(PARAMETERS, abs=0.001)


def test_the_rows_of_metas_queries_are_reordered(fine_tuned: Path, torchchat: Any) -> None:
    assert torchchat("convert", "--checkpoint-dir", fine_tuned).code == 0
    meta = torch.load(fine_tuned / "meta_model_0.pt", weights_only=True)
    written = load_file(fine_tuned / "converted" / "model.safetensors")
    assert torch.equal(written["model.layers.0.self_attn.q_proj.weight"],
                       half_split_rows(meta["layers.0.attention.wq.weight"], 8))


# ---- what cannot be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "message"), [
    (["--model-name", "llama3_8c"], "error: no model of torchtune that torchchat knows is called 'llama3_8c'\n"
                                    "try: did you mean llama3_8b"),
    (["--model-name", "llama3_8B"], "is another model than the one named: hidden_size is 64, not 4096"),
    (["--checkpoint-format", "hf"], "is not of the format 'hf': its tensors have the names of Meta\n"
                                    "try: the format is 'meta'"),
    (["--checkpoint-files", "meta_model_1.pt"], "did you mean meta_model_0.pt?"),
    (["--checkpoint-files", "meta_model_0.pt", "meta_model_1.pt"], "did you mean meta_model_0.pt?"),
    (["--adapter", "nothing-there"], "there is no file or folder 'nothing-there'"),
])
def test_a_torchtune_checkpoint_that_is_not_as_said_is_refused(more: list[str], message: str, fine_tuned: Path,
                                                               torchchat: Any) -> None:
    done = torchchat("convert", "--checkpoint-dir", fine_tuned, *more)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert not (fine_tuned / "converted").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["m"], "say where to write"),
    (["-o", "out"], "give one MODEL, or --checkpoint-dir"),
    (["a", "b", "-o", "out"], "more than one MODEL"),
    (["m", "-o", "out", "--dtype", "int8"], "--dtype: unknown dtype 'int8'"),
    (["m", "-o", "out", "--model-name", "llama3_8B"], "--model-name needs --checkpoint-dir"),
    (["m", "--checkpoint-dir", "d"], "MODEL 'm' and --checkpoint-dir exclude each other"),
    (["--checkpoint-dir", "d", "--checkpoint-format", "gguf"], "'gguf' is not one of 'meta', 'hf', 'torchtune'"),
])
def test_flags_that_do_not_go_together_are_wrong_usage(arguments: list[str], message: str, torchchat: Any) -> None:
    done = torchchat("convert", *arguments)
    assert done.code == 2
    assert message in done.err


def test_a_folder_that_is_there_is_refused_before_the_model_is_opened(tmp_path: Path, torchchat: Any) -> None:
    (tmp_path / "mine").write_text("precious")
    done = torchchat("convert", "no-such-model", "-o", tmp_path)
    assert done.code == 1
    assert "exists and is not empty" in done.err


def test_the_current_folder_is_refused(tmp_path: Path, torchchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = torchchat("convert", "embedded", "-o", ".")
    assert (done.code, "the current folder cannot become the new one" in done.err) == (1, True)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path, torchchat: Any,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    done = torchchat("convert", "embedded", "-o", tmp_path / "new")
    assert (done.code, "the weights need 6 MB" in done.err, list(tmp_path.glob("*new*"))) == (1, True, []), done.err


def test_what_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    program = ("import os, signal, sys\nfrom torchchat_core.sources import safetensors_writer\n"
               "from torchchat_core.cli.main import main\n"
               "import torchchat_core.sources.hugging_face_folder as module\n"
               "module.write_safetensors = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
               "main(['convert', 'embedded', '-o', 'new'])\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "XDG_CACHE_HOME": str(tmp_path.parent / "cache")})
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (143, "", [])


def test_meta_weights_without_sizes_say_what_is_missing(fine_tuned: Path, torchchat: Any) -> None:
    shutil.rmtree(fine_tuned / "original")
    done = torchchat("convert", "--checkpoint-dir", fine_tuned)
    assert (done.code, "there is no params.json beside meta_model_0.pt" in done.err) == (1, True)


# ---- what torchtune leaves beside its models ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00001-of-00001.bin", "torchtune_model_3.pt", "model-00001-of-00001.pt"])
def test_an_epochs_folder_runs_without_naming_its_file(name: str, fine_tuned: Path, torchchat: Any) -> None:
    (fine_tuned / "meta_model_0.pt").rename(fine_tuned / name)
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 2)}, fine_tuned / "adapter_model.pt")
    torch.save({"epochs_run": 1}, fine_tuned / "recipe_state.pt")
    save_file({"lora_A.weight": torch.ones(2, 2)}, fine_tuned / "adapter_model.safetensors")
    assert torchchat("convert", "--checkpoint-dir", fine_tuned).code == 0
    torch.testing.assert_close(logits(opened(fine_tuned / "converted")), logits(opened(fine_tuned / name)),
                               rtol=0, atol=1e-4)


def test_a_folder_with_an_adapter_alone_says_so(tmp_path: Path, torchchat: Any) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    done = torchchat("generate", tmp_path)
    assert (done.code, "holds an adapter, and no model" in done.err) == (1, True)
