"""Layers made with a text: what GPTQ makes of a matrix, the way through a model, and what recipes and files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.calibrating import calibrate_layers
from torchchat_core.quantization.calibration import CalibrationText, read_calibration
from torchchat_core.quantization.gptq import InputStatistics, quantise_for_inputs
from torchchat_core.quantization.layers import IntegerWeights, QuantizedLinear, WeightFormat
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.quantization.rounding import quantise
from torchchat_core.specs import Calibration
from torchchat_core.testing.models import TinyTokenizer, reference_logits, seeded, tiny_config

SYMMETRIC = WeightFormat(bits=4, group_size=32)
FORMATS = [SYMMETRIC, WeightFormat(bits=4, group_size=32, asymmetric=True), WeightFormat(bits=4, group_size=64)]
RAGGED = (24, 80)  # rows, columns: the last group is shorter


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int) -> Tensor:
    """Inputs that lie near a few directions, as those of language models do."""
    return numbers(tokens, columns // 4) @ numbers(columns // 4, columns, seed=1) + 0.3 * numbers(tokens, columns)


def statistics(inputs: Tensor, reference: Tensor | None = None) -> InputStatistics:
    made = InputStatistics.empty(inputs.shape[1], inputs.device)
    made.add(inputs, inputs if reference is None else reference)
    return made


def meaning(weights: IntegerWeights) -> Tensor:
    return QuantizedLinear(weights, None).dequantised(torch.float32)


def windows(count: int = 8, length: int = 32) -> Calibration:
    tokens = torch.randint(96, (count, length), generator=torch.Generator().manual_seed(3))
    return Calibration(windows=tuple(map(tuple, tokens.tolist())))


# ---- one matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_outputs_are_nearer_than_with_the_nearest_integers(form: WeightFormat) -> None:
    weight, inputs = numbers(*RAGGED), correlated(400, RAGGED[1])
    errors = [float((inputs @ (meaning(made) - weight).T).norm())
              for made in (quantise_for_inputs(weight, statistics(inputs), form), quantise(weight, form))]
    assert errors[0] < 0.7 * errors[1]


def test_drifted_inputs_are_made_up_for() -> None:
    weight, reference = numbers(*RAGGED), correlated(400, RAGGED[1])
    drifted = reference + 0.1 * reference.roll(1, 1)
    errors = [float((drifted @ meaning(quantise_for_inputs(weight, known, SYMMETRIC)).T - reference @ weight.T).norm())
              for known in (statistics(drifted, reference), statistics(drifted))]
    assert errors[0] < 0.8 * errors[1]


def test_positive_scales_stay_positive() -> None:
    made = quantise_for_inputs(numbers(*RAGGED), statistics(correlated(400, RAGGED[1])), SYMMETRIC, False)
    assert bool((made.scales > 0).all())
    assert torch.equal(made.scales.bfloat16().half(), made.scales)


@pytest.mark.parametrize("inputs", [numbers(3, 80), torch.zeros(200, 80), torch.ones(200, 80)],
                         ids=["few tokens", "nothing but zeros", "one direction"])
def test_inputs_that_say_little_leave_the_weights_near_what_they_were(inputs: Tensor) -> None:
    weight = numbers(*RAGGED)
    made = meaning(quantise_for_inputs(weight, statistics(inputs), SYMMETRIC))
    assert float((made - weight).norm() / weight.norm()) < 0.2


# ---- a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"attention_bias": True, "qk_norm": True},
                                     {"embedding_multiplier": 3.0, "sliding_window": 6}], ids=str)
def test_the_logits_of_a_model_are_nearer_than_with_the_nearest_integers(changes: dict[str, Any]) -> None:
    original = seeded(tiny_config(hidden_size=64, head_dim=16, **changes))
    models = [seeded(original.config) for _ in range(2)]
    report = calibrate_layers(models[0], "linear:int4", SYMMETRIC, windows())
    quantise_layers(models[1], "linear:int4", SYMMETRIC)
    tokens = windows().windows[0]
    expected = reference_logits(original, tokens)
    errors = [float((reference_logits(model, tokens) - expected).norm()) for model in models]
    assert errors[0] < 0.8 * errors[1]
    assert [layer.scheme for layer in report.layers] == ["linear:int4"] * 15
    assert not any(module._forward_pre_hooks for module in models[0].modules())
    assert torch.equal(models[0].model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_the_way_through_the_model_ends_at_layers_with_inputs_that_are_not_finite() -> None:
    model = seeded(tiny_config())
    model.model.layers[1].input_layernorm.weight[0] = float("inf")
    report = calibrate_layers(model, "linear:int4", SYMMETRIC, windows())
    left = {layer.name: layer.reason for layer in report.layers if layer.scheme is None}
    assert "model.layers.1.self_attn.q_proj" in left
    assert "model.layers.0.self_attn.q_proj" not in left
    assert set(left.values()) == {"the text gives it inputs that are not finite"}


# ---- recipes ------------------------------------------------------------------------------------------------------

GPTQ = '{"linear:int4": {"method": "gptq"}}'


def test_a_recipe_that_needs_a_text_is_refused_without_one_and_says_what_to_do() -> None:
    pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
    with pytest.raises(TorchchatError, match="made with a calibration text") as caught, \
            open_model(ModelRequest(quantize=GPTQ, device="cpu"), load_registry()):
        pass
    assert "--calibration FILE" in str(caught.value.fix)


def test_a_text_that_no_section_looks_at_is_refused() -> None:
    pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
    with pytest.raises(TorchchatError, match="no section of the recipe looks at a calibration text"):
        read_recipe("linear:int4", load_registry(), "cpu", "fp32").apply(seeded(tiny_config()), windows())


def test_sections_with_a_text_come_last_and_see_what_the_others_made() -> None:
    pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
    sections = {"linear:int4": {"method": "gptq", "except": ["lm_head"]}, "embedding:int4": {"groupsize": 0}}
    models = []
    for order in (sections, dict(reversed(sections.items()))):
        models.append(seeded(tiny_config()))
        made = registry_recipe(order)
        assert [layer.scheme for layer in made.apply(models[-1], windows()).layers][:2] == ["embedding:int4",
                                                                                          "linear:int4"]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert isinstance(models[0].lm_head, nn.Linear)


def registry_recipe(sections: dict[str, Any]) -> Any:
    return read_recipe(json.dumps(sections), load_registry(), "cpu", "fp32", calibrated=True)


# ---- the text -----------------------------------------------------------------------------------------------------


def test_the_text_becomes_windows_of_one_length_that_begin_as_texts_do(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcd" * 500, encoding="utf-8")
    made = read_calibration(CalibrationText(path=tmp_path / "text", tokens=700), TinyTokenizer(), 101)
    assert [len(window) for window in made.windows] == [101] * 7
    assert {window[:5] for window in made.windows} == {(0, 100, 101, 102, 103)}


def test_a_short_text_is_one_window(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 130, encoding="utf-8")
    made = read_calibration(CalibrationText(path=tmp_path / "text"), TinyTokenizer(), 4096)
    assert [len(window) for window in made.windows] == [131]


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"abc", "has 3 tokens; 128 are the least"),
                                                  (b"abc\xff" * 99, "is not UTF-8")])
def test_a_text_that_cannot_be_used_is_told(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(TorchchatError, match=message):
        read_calibration(CalibrationText(path=tmp_path / "text"), TinyTokenizer(), 512)
