"""`torchchat quantize` writes a folder that opens as the same model, and a damaged one is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import build_model
from torchchat_core.pipeline import ModelRequest, open_model, quantise_model
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import parse_recipe
from torchchat_core.quantization.saved import MANIFEST
from torchchat_core.quantization.writing import write_quantised
from torchchat_core.sources.local import LocalSource
from torchchat_core.specs import ModelFiles, ModelRef
from torchchat_core.testing.models import VARIANTS, reference_logits, seeded, tiny_config

RECIPE = '{"linear:int4": {}, "linear:int8": {"layers": ["lm_head"], "groupsize": 0}}'
TOKENS = (3, 1, 4, 1, 5)


def quantised(model: Transformer, recipe: str, folder: Path, registry: Registry, dtype: str = "fp32") -> Transformer:
    """The model, quantised in place, and written to the folder."""
    wished = parse_recipe(recipe, registry)
    report = wished.settle(registry, "cpu", dtype).apply(model)
    files = ModelFiles(ref=ModelRef(text="t", scheme="file", location="t"), format="safetensors", root=folder.parent,
                       weights=())
    write_quantised(model, wished.content, report, files, registry, folder, dtype)
    return model


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    source = LocalSource()
    return build_model(source.open(source.fetch(ModelRef(text="t", scheme="file", location=str(folder)))), dtype)


@pytest.mark.parametrize("recipe", [RECIPE, "linear:int8", '{"embedding": {"bitwidth": 4}, "linear:int4": {}}',
                                    '{"embedding": {}}', '{"linear:int4": {"layers": ["lm_head"]}}'])
@pytest.mark.parametrize("variant", ["llama", "tied", "biases", "interleaved-rope", "odd-sizes"])
def test_what_was_written_opens_as_the_same_model(variant: str, recipe: str, registry: Registry, tmp_path: Path
                                                  ) -> None:
    made = quantised(seeded(tiny_config(**VARIANTS[variant])), recipe, tmp_path / "q", registry)
    read = opened(tmp_path / "q")
    assert read.config.rope_interleaved == made.config.rope_interleaved
    assert torch.equal(reference_logits(read, TOKENS), reference_logits(made, TOKENS))
    states = made.state_dict(), read.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_whole_way_gives_the_same_answers(registry: Registry, tmp_path: Path) -> None:
    """Quantised while it is opened, and opened from what was written."""
    _, report = quantise_model(ModelRequest(quantize=RECIPE), tmp_path / "q", registry)
    scores = []
    for request in (ModelRequest(quantize=RECIPE, device="cpu"), ModelRequest(model=str(tmp_path / "q"), device="cpu")):
        with open_model(request, registry) as model:
            scores.append(model.model.session().prefill(TOKENS))
            assert model.text_format.tokenizer.encode("Hello")
    assert torch.equal(*scores)
    assert len(report.done) == 29
    content = json.loads((tmp_path / "q" / MANIFEST).read_text())
    assert content["recipe"] == json.loads(RECIPE)


def test_a_quantised_model_is_not_quantised_again(registry: Registry, tmp_path: Path) -> None:
    quantise_model(ModelRequest(quantize="linear:int8"), tmp_path / "q", registry)
    request = ModelRequest(model=str(tmp_path / "q"), quantize="linear:int4", device="cpu")
    with pytest.raises(TorchchatError, match="quantised already \\(linear:int8\\)"), open_model(request, registry):
        pass
    with pytest.raises(TorchchatError, match="quantised already"):
        quantise_model(request, tmp_path / "again", registry)
    assert not (tmp_path / "again").exists()


def test_an_executor_is_asked_for_the_schemes_that_are_in_the_file(registry: Registry, tmp_path: Path) -> None:
    from torchchat_core.specs import ExecutorInfo

    quantise_model(ModelRequest(quantize="linear:int8"), tmp_path / "q", registry)
    plain = ExecutorInfo(name="plain", summary="s", factory="x:y", reads=frozenset({"module"}),
                         devices=frozenset({"cpu"}), dtypes=frozenset({"bf16"}))
    from types import ModuleType

    from torchchat_core.hookspecs import hookimpl

    module = ModuleType("plain")
    module.torchchat_executors = hookimpl(lambda: [plain])  # type: ignore[attr-defined]
    registry.add(module, "plain", "plain")
    request = ModelRequest(model=str(tmp_path / "q"), executor="plain", device="cpu", dtype="bf16")
    with pytest.raises(TorchchatError, match="does not run linear:int8"), open_model(request, registry):
        pass


def test_a_folder_runs_without_the_plugin_that_made_it(registry: Registry, tmp_path: Path, torchchat: Any) -> None:
    quantise_model(ModelRequest(quantize=RECIPE), tmp_path / "q", registry)
    arguments = ("generate", tmp_path / "q", "--device", "cpu", "--prompt", "Hello", "--max-new-tokens", "4",
                 "--temperature", "0")
    without = torchchat("-p", "no:tc-quant-int4", "-p", "no:tc-quant-int8", *arguments)
    assert without.code == 0, without.err
    assert without.out.strip()
    assert without.out == torchchat(*arguments).out
    again = torchchat("-p", "no:tc-quant-int4", "generate", "embedded", "--quantize", "linear:int4", "--device", "cpu")
    assert again.code == 2
    assert "no recipe, file or scheme 'linear:int4'" in again.err


def test_an_export_of_a_folder_is_refused_with_what_to_do(registry: Registry, tmp_path: Path, torchchat: Any) -> None:
    pytest.importorskip("tc_gguf", reason="tc-gguf is not installed")
    quantise_model(ModelRequest(quantize=RECIPE), tmp_path / "q", registry)
    done = torchchat("export", tmp_path / "q", "-o", tmp_path / "model.gguf")
    assert done.code == 1
    assert "exporter 'gguf' does not write the model's layers of linear:int4; it writes no quantised layers" in done.err
    assert "export the model that it was made of" in done.err
    assert "--quantize" not in done.err


def test_layers_of_a_plugin_s_own_kind_cannot_be_written(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(TorchchatError, match="linear:own cannot be written"):
        quantise_model(ModelRequest(quantize="linear:own"), tmp_path / "q", registry)
    assert not (tmp_path / "q").exists()


# ---- damaged folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised") / "q"


@pytest.fixture
def copy(folder: Path, registry: Registry, tmp_path: Path) -> Path:
    """A folder of one's own, to damage."""
    if not folder.exists():
        quantised(seeded(tiny_config(attention_bias=True)), RECIPE, folder, registry)
    return Path(shutil.copytree(folder, tmp_path / "copy"))


NAME = "model.layers.0.mlp.up_proj"


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")
    return apply


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / MANIFEST).read_text())
        change(found)
        (folder / MANIFEST).write_text(json.dumps(found))
    return apply


@pytest.mark.parametrize(("damage", "message"), [
    (tensors(lambda t: t.update({f"{NAME}.values": t[f"{NAME}.values"][:-1].clone()})), "it has to be uint8"),
    (tensors(lambda t: t.update({f"{NAME}.values": t[f"{NAME}.values"].float()})), "is float32 .* has to be uint8"),
    (tensors(lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].float()})), "it has to be float16"),
    (tensors(lambda t: t.pop(f"{NAME}.scales")), f"no tensor '{NAME}.scales'"),
    (tensors(lambda t: t.pop("model.layers.0.self_attn.q_proj.bias")), "no tensor"),
    (tensors(lambda t: t.pop("model.norm.weight")), "no tensor 'model.norm.weight'"),
    (tensors(lambda t: t.update({f"{NAME}.centres": t[f"{NAME}.scales"].clone()})), "has no place for"),
    (tensors(lambda t: t.update({f"{NAME}.weight": torch.zeros(48, 32)})), "has no place for"),
    (manifest(lambda m: m["layers"].pop(NAME)), "has no tensor|no place for"),
    (manifest(lambda m: m["layers"].update({"model.nothing": m["layers"][NAME]})), "which the model does not have"),
    (manifest(lambda m: m["layers"].update({"model": m["layers"][NAME]})), "which the model does not have"),
    (manifest(lambda m: m["layers"][NAME]["format"].update(bits=8)), "it has to be uint8"),
    (manifest(lambda m: m["layers"][NAME]["format"].update(bits=2)), "a weight of 2 bits"),
    (manifest(lambda m: m["layers"][NAME]["format"].update(group_size=[])), "the group size is"),
    (manifest(lambda m: m["layers"][NAME].update(format=None)), "is not a format of quantized weights"),
    (manifest(lambda m: m["layers"][NAME].update(scheme=7)), "has no scheme for the layer"),
    (manifest(lambda m: m.update(layers={})), "names no layers"), (manifest(lambda m: m.pop("dtype")), "does not say"),
    (manifest(lambda m: m.update(version=9)), "of version 9"),
    (lambda folder: (folder / MANIFEST).unlink(), f"there is no {MANIFEST}"),
    (lambda folder: (folder / MANIFEST).write_text("[]"), "has to be an object"),
    (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
])
def test_a_damaged_folder_is_told(damage: Callable[[Path], None], message: str, copy: Path) -> None:
    opened(copy)
    damage(copy)
    with pytest.raises(TorchchatError, match=message):
        opened(copy)


def test_any_invalid_value_in_the_manifest_is_a_short_error(
        copy: Path, with_strange_values: Any, message_of: Any) -> None:
    path = copy / MANIFEST
    content = json.loads(path.read_text())
    content["layers"] = dict(list(content["layers"].items())[:1])
    for damaged in with_strange_values(content):
        path.write_text(json.dumps(damaged))
        assert len(message_of(lambda: opened(copy))) < 400


def test_the_config_says_to_others_that_the_weights_are_torchchat_s(copy: Path) -> None:
    content = json.loads((copy / "config.json").read_text())
    assert content["quantization_config"] == {"quant_method": "torchchat"}
    assert isinstance(opened(copy).config, ModelConfig)
