"""A model is written in Hugging Face's format so that transformers computes the same with it, and we do."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig, RopeScaling, config_from_hugging_face
from torchchat_core.models.hugging_face_config import config_to_hugging_face
from torchchat_core.models.rope_layout import half_split_rows, interleaved_rows
from torchchat_core.models.weights import build_model, weight_shapes
from torchchat_core.pipeline import ModelRequest, fetch_files, open_files
from torchchat_core.plugins import Registry
from torchchat_core.sources.hugging_face_folder import write_folder
from torchchat_core.specs import Checkpoint, ModelFiles, ModelRef
from torchchat_core.testing.models import VARIANTS, reference_logits, seeded, tiny_config, variant_config

IDS = [1, 3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
STORIES = "tinyllamas/stories260K"


class ModelCheckpoint:
    """The weights of a module as a checkpoint."""

    dtype = torch.float32

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self._weights = dict(seeded(config, seed).named_parameters())

    def names(self) -> Iterable[str]:
        return self._weights

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights[name].detach().to(dtype or self.dtype)


NO_FILES = ModelFiles(ref=ModelRef(text="m", scheme="file", location="m"), format="made", root=Path("m"), weights=())


def opened(model: Path, registry: Registry, **more: Any) -> tuple[ModelFiles, Checkpoint]:
    files = fetch_files(ModelRequest(model=str(model), **more), registry)
    return files, open_files(files, registry)


def our_logits(checkpoint: Checkpoint) -> Tensor:
    return reference_logits(build_model(checkpoint, torch.float32), IDS, limit=len(IDS))  # what longrope goes by


def transformers_logits(folder: Path) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def same_everywhere(checkpoint: Checkpoint, folder: Path, registry: Registry) -> None:
    """What was written computes as the original does, in transformers and in torchchat."""
    expected = our_logits(checkpoint)
    torch.testing.assert_close(transformers_logits(folder), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(our_logits(opened(folder, registry)[1]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("file", ["stories260K.pt", "stories260K.bin", "stories260K.v1.bin"])
def test_models_of_llama2c_compute_the_same(file: str, testdata: Path, tmp_path: Path,
                                            isolated_registry: Registry) -> None:
    files, checkpoint = opened(testdata / STORIES / file, isolated_registry)
    write_folder(checkpoint, files, isolated_registry, tmp_path / "out", "fp32")
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)
    same_everywhere(opened(testdata / "hf/stories260K", isolated_registry)[1], tmp_path / "out", isolated_registry)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (testdata / STORIES / "tok512.model").read_bytes()


@pytest.mark.parametrize("file", ["stories260K.gguf", "../../gguf/synth256-Q8_0.gguf"])
def test_a_gguf_file_computes_the_same(file: str, testdata: Path, tmp_path: Path, isolated_registry: Registry) -> None:
    isolated_registry.add(pytest.importorskip("tc_gguf"), "tc_gguf", "tc-gguf", "0")
    files, checkpoint = opened(testdata / STORIES / file, isolated_registry)
    write_folder(checkpoint, dataclasses.replace(files, tokenizer=()), isolated_registry, tmp_path / "out", "fp32")
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)


def test_a_checkpoint_with_metas_names_computes_the_same(testdata: Path, tmp_path: Path,
                                                         isolated_registry: Registry) -> None:
    shutil.copy(testdata / "checkpoints/demo_rand_params.pth", tmp_path / "consolidated.00.pth")
    shutil.copy(testdata / "checkpoints/demo_config.json", tmp_path / "params.json")
    files, checkpoint = opened(tmp_path, isolated_registry)
    write_folder(checkpoint, files, isolated_registry, tmp_path / "out", "fp32")
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"longrope"}))
def test_every_variation_of_the_transformer_computes_the_same(variant: str, tmp_path: Path,
                                                              isolated_registry: Registry) -> None:
    biases = {"attention_bias": True} if variant == "sliding-layers" else {}  # as Qwen 2, the class that has them
    checkpoint = ModelCheckpoint(dataclasses.replace(variant_config(variant), **biases))
    write_folder(checkpoint, NO_FILES, isolated_registry, tmp_path / "out", "fp32")
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)


SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=2.0),
    "dynamic": RopeScaling(kind="dynamic", factor=4.0, original_context=32),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_context=64),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_context=32, beta_fast=16.0, attention_factor=1.2),
    "yarn with mscale": RopeScaling(kind="yarn", factor=4.0, original_context=32, mscale=1.0, mscale_all_dim=0.5),
    "longrope": RopeScaling(kind="longrope", factor=4.0, original_context=32, short_factor=(1.0, 1.1, 1.2, 1.3),
                            long_factor=(1.0, 2.0, 3.0, 4.0)),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_scaling_of_rope_computes_the_same(scaling: str, interleaved: bool, tmp_path: Path,
                                                 isolated_registry: Registry) -> None:
    checkpoint = ModelCheckpoint(tiny_config(rope_scaling=SCALINGS[scaling], rope_interleaved=interleaved))
    write_folder(checkpoint, NO_FILES, isolated_registry, tmp_path / "out", "fp32")
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "tied_embeddings": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"attention_bias": True, "sliding_window": 6, "sliding_layers": (False, True)},
    "qwen3": {"qk_norm": True},
    "granite": VARIANTS["multipliers"],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_json_says_what_the_config_says(architecture: str) -> None:
    config = tiny_config(architecture=architecture, **ARCHITECTURES[architecture])
    assert config_from_hugging_face(config_to_hugging_face(config)) == config


def test_a_llama_with_what_hugging_faces_llama_lacks_becomes_the_class_that_has_it() -> None:
    assert config_to_hugging_face(tiny_config(sliding_window=6))["architectures"] == ["MistralForCausalLM"]
    assert config_to_hugging_face(tiny_config(attention_bias=True))["model_type"] == "qwen2"


def test_a_model_that_no_class_describes_is_refused() -> None:
    with pytest.raises(TorchchatError, match="describes this 'llama' model"):
        config_to_hugging_face(tiny_config(qk_norm=True, mlp_bias=True))


def test_the_orders_of_rows_are_inverse_for_weights_and_biases() -> None:
    for tensor in (torch.randn(24, 3), torch.randn(24)):
        assert torch.equal(half_split_rows(interleaved_rows(tensor, 4), 4), tensor)
    assert interleaved_rows(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(TorchchatError, match="not that of 5 attention heads"):
        half_split_rows(torch.randn(24, 3), 5)


def test_tensors_are_written_one_at_a_time(tmp_path: Path, isolated_registry: Registry) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Counting(ModelCheckpoint):
        def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = super().tensor(name, dtype).clone()
            alive.append(weakref.ref(tensor))
            return tensor

    write_folder(Counting(tiny_config(tied_embeddings=True)), NO_FILES, isolated_registry, tmp_path / "out", "fp32")
    assert len(alive) == len(weight_shapes(tiny_config(tied_embeddings=True)))


def test_a_large_model_becomes_shards_with_an_index(tmp_path: Path, isolated_registry: Registry) -> None:
    checkpoint = ModelCheckpoint(tiny_config())
    write_folder(checkpoint, NO_FILES, isolated_registry, tmp_path / "out", "fp32", shard_bytes=30_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert all(shard.stat().st_size < 32_000 for shard in shards)
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(shape).numel() for shape in
                                                  weight_shapes(checkpoint.config).values())
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)


def test_equal_input_and_output_embeddings_are_written_once(tmp_path: Path, isolated_registry: Registry) -> None:
    checkpoint = ModelCheckpoint(tiny_config())
    checkpoint._weights["lm_head.weight"] = checkpoint._weights["model.embed_tokens.weight"]
    write_folder(checkpoint, NO_FILES, isolated_registry, tmp_path / "out", "fp32")
    written = opened(tmp_path / "out", isolated_registry)[1]
    assert "lm_head.weight" not in written.names()
    assert written.config.tied_embeddings
    same_everywhere(checkpoint, tmp_path / "out", isolated_registry)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_weights_get_the_dtype_that_was_asked_for(dtype: str, expected: torch.dtype, tmp_path: Path,
                                                      isolated_registry: Registry) -> None:
    checkpoint = ModelCheckpoint(tiny_config())
    write_folder(checkpoint, NO_FILES, isolated_registry, tmp_path / "out", dtype)
    written = opened(tmp_path / "out", isolated_registry)[1]
    for name in checkpoint.names():
        assert torch.equal(written.tensor(name), checkpoint.tensor(name, expected))


def damaged(change: Callable[[ModelCheckpoint], object]) -> ModelCheckpoint:
    checkpoint = ModelCheckpoint(tiny_config())
    change(checkpoint)
    return checkpoint


@pytest.mark.parametrize(("change", "message"), [
    (lambda made: made._weights.pop("model.norm.weight"), "has no tensor 'model.norm.weight'"),
    (lambda made: made._weights.update({"model.norm.weight": torch.ones(3)}), "has the shape [3]"),
    (lambda made: made._weights.update({"model.other": torch.ones(3)}), "no place for, such as 'model.other'"),
    (lambda made: made._weights.update({"model.norm.weight": torch.full((32,), 1e6)}), "largest of fp16"),
])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(change: Callable[[ModelCheckpoint], object], message: str,
                                                            tmp_path: Path, isolated_registry: Registry) -> None:
    with pytest.raises(TorchchatError) as raised:
        write_folder(damaged(change), NO_FILES, isolated_registry, tmp_path / "out", "fp16")
    assert message in raised.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, isolated_registry: Registry) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(TorchchatError, match="exists and is not empty"):
        write_folder(ModelCheckpoint(tiny_config()), NO_FILES, isolated_registry, tmp_path, "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(tmp_path: Path, isolated_registry: Registry) -> None:
    (tmp_path / "out").mkdir()
    write_folder(ModelCheckpoint(tiny_config()), NO_FILES, isolated_registry, tmp_path / "out", "fp32")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_all_that_belongs_to_a_hugging_face_model_goes_along(testdata: Path, tmp_path: Path,
                                                             isolated_registry: Registry) -> None:
    source = testdata / "hf/TinyStories-656K"
    files, checkpoint = opened(source, isolated_registry)
    write_folder(checkpoint, files, isolated_registry, tmp_path / "out", "fp32")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["torch_dtype"]) == (1, 2, "float32")


def test_named_chat_templates_and_small_files_go_along(testdata: Path, tmp_path: Path,
                                                       isolated_registry: Registry) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in (testdata / "hf/TinyStories-656K").iterdir():
        shutil.copyfile(path, source / path.name)
    texts = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool_use.jinja": "{{ tools }}",
             "added_tokens.json": "{}"}
    (source / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (source / name).write_text(text, "utf-8")
    files, checkpoint = opened(source, isolated_registry)
    write_folder(checkpoint, files, isolated_registry, tmp_path / "out", "fp32")
    assert {name: (tmp_path / "out" / name).read_text("utf-8") for name in texts} == texts


def test_a_template_that_was_found_by_the_models_name_is_written_down(testdata: Path, tmp_path: Path,
                                                                      isolated_registry: Registry) -> None:
    source = tmp_path / "Llama-2-tiny-chat"
    shutil.copytree(testdata / "hf/stories260K", source)
    files, checkpoint = opened(source, isolated_registry)
    write_folder(checkpoint, files, isolated_registry, tmp_path / "out", "fp32")
    assert "[INST]" in (tmp_path / "out" / "chat_template.jinja").read_text()
