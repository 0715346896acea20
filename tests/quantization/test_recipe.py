"""Recipes: what they accept, which layers they take, what they report, and what they refuse."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import Transformer
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import Registry
from torchchat_core.quantization.layers import QuantizedEmbedding, QuantizedLinear
from torchchat_core.quantization.recipe import RecipeReport, parse_recipe, read_recipe, recipe_names, stored_recipe
from torchchat_core.quantization.replacing import reason_to_leave
from torchchat_core.testing.models import seeded, tiny_config


def applied(recipe: dict[str, Any], registry: Registry, **changes: Any) -> tuple[Transformer, RecipeReport]:
    model = seeded(tiny_config(**changes))
    return model, read_recipe(json.dumps(recipe), registry, "cpu", "fp32").apply(model)


def schemes(report: RecipeReport) -> dict[str, str | None]:
    return {layer.name: layer.scheme for layer in report.layers}


def test_a_section_without_layers_takes_what_no_other_names(registry: Registry) -> None:
    model, report = applied({"linear:int4": {"except": ["*.up_proj"]},
                             "linear:int8": {"layers": ["lm_head", "*.0.mlp.*"], "except": ["*.up_proj"]}}, registry)
    found = schemes(report)
    assert len(found) == 15
    assert [name for name, scheme in found.items() if scheme == "linear:int8"] == [
        "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    assert found["model.layers.0.mlp.up_proj"] is found["model.layers.1.mlp.up_proj"] is None
    left = {layer.reason for layer in report.left}
    assert left == {"the recipe leaves it out"}
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.gate_proj, QuantizedLinear)
    assert model.model.layers[0].mlp.gate_proj.format.bits == 8


def test_layers_left_out_are_those_that_were_there(registry: Registry) -> None:
    model = seeded(tiny_config())
    before = model.model.layers[0].self_attn.o_proj
    read_recipe('{"linear:int4": {"except": ["*.o_proj"]}}', registry, "cpu", "fp32").apply(model)
    assert model.model.layers[0].self_attn.o_proj is before


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_are_those_of_the_whole_model_and_shared_ones_count_once(tied: bool, registry: Registry) -> None:
    _, report = applied({"linear:int8": {"layers": ["lm_head"]}}, registry, tied_embeddings=tied)
    plain = seeded(tiny_config(tied_embeddings=tied))
    assert report.bytes_before == sum(tensor.nbytes for tensor in (*plain.parameters(), *plain.buffers()))
    head = 96 * 32 + 96 * 2  # values and scales
    assert report.bytes_after == report.bytes_before + head - (0 if tied else 96 * 32 * 4)


def test_the_embedding_goes_by_the_original_s_name(registry: Registry) -> None:
    for bits in (4, 8):
        model, report = applied({"embedding": {"bitwidth": bits, "groupsize": 32}}, registry)
        assert schemes(report) == {"model.embed_tokens": f"embedding:int{bits}"}
        assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
        assert model.model.embed_tokens.format.bits == bits


@pytest.mark.parametrize("recipe", [
    {"linear:int8": {"bitwidth": 8, "groupsize": 0}}, {"linear:int8": {"bitwidth": 8, "groupsize": 32}},
    {"linear:int4": {"bitwidth": 4, "groupsize": 32}}, {"embedding": {"bitwidth": 8, "groupsize": 0}},
    {"embedding": {"bitwidth": 4, "groupsize": 32}}, {"embedding:int8": {"bitwidth": 8}}], ids=json.dumps)
def test_a_section_may_repeat_the_bitwidth_of_its_scheme(recipe: dict[str, Any], registry: Registry) -> None:
    section, = recipe.values()
    model, report = applied(recipe, registry)
    assert report.done
    layer = model.get_submodule(report.done[0].name)
    assert layer.format.bits == section["bitwidth"]
    assert layer.format.group_size == (section.get("groupsize", 32) or None)


def test_the_place_of_a_recipe_in_the_original_tool_stands_for_the_one_that_comes_along(registry: Registry) -> None:
    for place in ("config/data/mobile.json", "./config/data/mobile.json"):
        assert parse_recipe(place, registry).sections == parse_recipe("mobile", registry).sections


def test_another_file_that_is_not_there_leads_to_the_name_of_a_recipe(registry: Registry) -> None:
    with pytest.raises(TorchchatError, match="the recipe comes with torchchat") as caught:
        parse_recipe("somewhere/mobile.json", registry)
    assert caught.value.fix == "--quantize mobile"


def test_a_recipe_comes_from_a_name_a_file_or_text(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"version": 1, "linear:int4": {"groupsize": 64}}')
    assert parse_recipe(str(tmp_path / "mine.json"), registry).sections == {"linear:int4": {"groupsize": 64}}
    assert parse_recipe("linear:int4", registry).sections == {"linear:int4": {}}
    assert parse_recipe("cuda", registry).sections == {"linear:int4": {"groupsize": 256}}
    assert recipe_names() == ("cpu", "cuda", "desktop", "mobile", "pi5")


@pytest.mark.parametrize(("content", "message"), [
    (b'{"linear:int4": {"groupsize": 32}, "linear:int4": {"groupsize": 64}}', "has 'linear:int4' twice"),
    (b'{"linear:int4": {"groupsize": 32, "groupsize": 64}}', "has 'groupsize' twice"),
    (b'{"linear:int4": {', "recipe .*mine.json is not JSON"),
    (b"[" * 100_000, "recipe .*mine.json is not JSON"),
    (b"[1]", "recipe .*mine.json holds a JSON list"),
    (b"", "recipe .*mine.json is not JSON"),
    (b'{"linear:int4\xff": {}}', "recipe .*mine.json is not UTF-8: byte 13 is 0xff"),
    (b'{"linear:int4": {"layers": [' + b'"lm_head",' * 200_000 + b'"lm_head"]}}', "has more than 1048576 bytes"),
], ids=["section", "option", "cut", "deep", "list", "empty", "encoding", "size"])
def test_a_file_that_is_no_recipe_is_told_as_such(content: bytes, message: str, registry: Registry, tmp_path: Path
                                                  ) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(TorchchatError, match=message) as caught:
        parse_recipe(str(tmp_path / "mine.json"), registry)
    assert "download" not in str(caught.value)


@pytest.mark.parametrize("recipe", [
    json.dumps({"k" * 100_000: {}}), json.dumps({"linear:" + "k" * 100_000: {}}),
    json.dumps({"version": "k" * 100_000}), json.dumps({"linear:int4": "k" * 100_000}),
    json.dumps({"linear:int4": {"groupsize": "k" * 100_000}}),
    json.dumps({"linear:int4": {"k" * 100_000: 1}}), json.dumps({"linear:int4": {"layers": "k" * 100_000}}),
    json.dumps({"linear:int4": {"bitwidth": "k" * 100_000}}), json.dumps({"embedding": {"bitwidth": "k" * 100_000}}),
    json.dumps({"executor": "k" * 100_000}), "k" * 100_000], ids=lambda recipe: recipe[:20])
def test_what_is_wrong_is_quoted_in_short(recipe: str, registry: Registry) -> None:
    with pytest.raises(TorchchatError) as caught:
        read_recipe(recipe, registry, "cpu", "fp32")
    assert len(str(caught.value)) < 1000


def test_the_recipe_chooses_dtype_and_device_where_the_user_does_not(registry: Registry) -> None:
    recipe = '{"executor": {"accelerator": "cpu"}, "precision": {"dtype": "fp32"}, "linear:int8": {}}'
    for dtype, expected in ((None, "fp32"), ("bf16", "bf16")):
        with open_model(ModelRequest(quantize=recipe, dtype=dtype), registry) as opened:
            assert (opened.model.device, opened.model.dtype) == ("cpu", expected)
            assert opened.quantisation is not None
            assert len(opened.quantisation.done) == 29
    if not torch.cuda.is_available():
        with pytest.raises(TorchchatError, match="the recipe 'cuda' needs the device cuda"), \
                open_model(ModelRequest(quantize="cuda"), registry):
            pass
        with open_model(ModelRequest(quantize="cuda", device="cpu"), registry) as opened:
            assert opened.model.device == "cpu"


@pytest.mark.parametrize(("recipe", "message"), [
    ({"liner:int4": {}}, "no installed quantizer makes 'liner:int4'.*did you mean linear:int4"),
    ({"precison": {"dtype": "bf16"}}, "unknown key 'precison'.*did you mean precision"),
    ({"precision": {"dtype": "bf17"}, "linear:int4": {}}, "unknown dtype 'bf17'"),
    ({"precision": "bf16", "linear:int4": {}}, "'precision' is 'bf16' in the recipe; it has to be an object"),
    ({"executor": {"device": "cpu"}, "linear:int4": {}}, "with 'accelerator' alone"),
    ({"executor": {"accelerator": "gpu"}, "linear:int4": {}}, "unknown device 'gpu'"),
    ({"version": 2, "linear:int4": {}}, "of version 2; this torchchat reads version 1"),
    ({"version": 1}, "the recipe is empty"),
    ({"linear:int4": {"groupsize": -1}}, "linear:int4: groupsize is -1"),
    ({"linear:int4": {"groupsize": 40}}, "the group size is 40"),
    ({"linear:int4": {"group_size": 32}}, "no option 'group_size'.*did you mean groupsize"),
    ({"embedding": {"bitwidth": 3}}, "the bitwidth of the embedding is 3"),
    ({"linear:int4": {"bitwidth": 8}}, "the bitwidth of 'linear:int4' is 8 in the recipe; that scheme has 4"),
    ({"linear:int8": {"bitwidth": True}}, "the bitwidth of 'linear:int8' is True"),
    ({"embedding:int4": {"bitwidth": 8}}, "the bitwidth of 'embedding:int4' is 8"),
    ({"linear:gptq": {"groupsize": 32}}, 'is no scheme.*"linear:int4": {"method": "gptq"}'),
    ({"embedding": {}, "embedding:int8": {}}, "two sections for 'embedding:int8'"),
    ({"linear:int4": {}, "linear:int8": {}}, "both take all linear layers"),
    ({"linear:int4": {"layers": ["lm_head"]}, "linear:int8": {"layers": ["lm_*"]}}, "both name the layer 'lm_head'"),
    ({"linear:int4": {"layers": ["lm_hed"]}}, "'lm_hed', which is no linear layer of this model.*did you mean lm_head"),
    ({"linear:int4": {"except": ["model.embed_tokens"]}}, "which is no linear layer"),
    ({"linear:int4": {"layers": "lm_head"}}, "'layers' of 'linear:int4' is 'lm_head'; it has to be a list"),
    ({"linear:int4": {"layers": []}}, "is empty: the section would take no layer"),
])
def test_a_recipe_that_cannot_be_followed_is_told(recipe: dict[str, Any], message: str, registry: Registry) -> None:
    with pytest.raises(TorchchatError) as caught, open_model(ModelRequest(quantize=json.dumps(recipe)), registry):
        pass
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_wrong_selection_changes_nothing(registry: Registry) -> None:
    model = seeded(tiny_config())
    with pytest.raises(TorchchatError, match="which is no linear layer"):
        read_recipe('{"embedding": {}, "linear:int4": {"layers": ["x"]}}', registry, "cpu", "fp32").apply(model)
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_left_alone(number: float, registry: Registry) -> None:
    model = seeded(tiny_config())
    model.lm_head.weight[0, 0] = number
    report = read_recipe("linear:int8", registry, "cpu", "fp32").apply(model)
    assert [(layer.name, layer.reason) for layer in report.left] == [
        ("lm_head", "it has weights that are not finite")]


def test_recipes_that_say_the_same_have_one_text_and_those_that_do_not_have_others(registry: Registry) -> None:
    def text(recipe: str) -> str:
        return str(read_recipe(recipe, registry, "cpu", "fp32"))

    assert text("linear:int4") == "linear:int4"
    assert text('{"linear:int4": {"groupsize": 32, "bitwidth": 4}, "version": 1}') == "linear:int4"
    assert text('{"linear:int4": {"groupsize": 64}}') == "linear:int4 groupsize=64"
    one, other = '"linear:int4": {"except": ["a", "b"]}', '"embedding": {"bitwidth": 4, "groupsize": 0}'
    assert text(f"{{{one}, {other}}}") == text(f"{{{other}, {one}}}")
    assert 'except=["a", "b"]' in text(f"{{{one}}}")


def test_what_is_stored_is_named_by_the_recipe_that_was_written_down(registry: Registry) -> None:
    schemes = ("linear:int4",)
    named = stored_recipe({"linear:int4": {"groupsize": 32}}, schemes, registry, "cpu", "fp32")
    assert named == str(read_recipe("linear:int4", registry, "cpu", "fp32"))
    assert stored_recipe(None, (), registry, "cpu", "fp32") is None
    assert stored_recipe(None, schemes, registry, "cpu", "fp32") == "linear:int4 as stored"
    unknown = stored_recipe({"linear:int3": {}}, ("linear:int3",), registry, "cpu", "fp32")
    assert unknown == '{"linear:int3": {}}'


class Largest(TorchDispatchMode):
    """The most bytes that an operation gave back."""

    bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            self.bytes = max(self.bytes, getattr(tensor, "nbytes", 0))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looking_for_weights_that_are_not_finite_copies_none(dtype: torch.dtype) -> None:
    layer = nn.Linear(512, 512, dtype=dtype).requires_grad_(False)
    with Largest() as largest:
        assert reason_to_leave(layer, lambda *_: None) is None
    assert 0 < largest.bytes < 100
