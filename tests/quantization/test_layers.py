"""Quantised layers mean the same everywhere: as they are stored, in core's kernels, and in ATen's products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.quantization import running
from torchchat_core.quantization.layers import (
    IntegerWeights,
    QuantizedEmbedding,
    QuantizedLinear,
    WeightFormat,
    format_from_json,
    packed_values,
    rounded_rows,
    unpacked_values,
)
from torchchat_core.quantization.rounding import quantise

FORMATS = [WeightFormat(bits=8), WeightFormat(bits=8, group_size=32), WeightFormat(bits=4, group_size=32),
           WeightFormat(bits=4, group_size=128), WeightFormat(bits=4, group_size=32, asymmetric=True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BUILT = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05


def layer(form: WeightFormat, rows: int = 64, columns: int = 256, bias: bool = True) -> QuantizedLinear:
    return QuantizedLinear(quantise(matrix(rows, columns), form), torch.randn(rows) if bias else None)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("columns", [1, 6, 7])
def test_four_bits_lie_two_to_a_byte_and_come_back(columns: int) -> None:
    stored = torch.randint(0, 16, (3, columns), dtype=torch.uint8)
    packed = packed_values(stored, 4)
    assert packed.shape == (3, (columns + 1) // 2)
    assert int(packed[0, 0] & 15) == int(stored[0, 0])
    assert torch.equal(unpacked_values(packed, columns, 4), stored)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("size", [(64, 256), (7, 50), (1, 1)])
def test_the_weights_are_near_those_that_were_quantised(form: WeightFormat, size: tuple[int, int]) -> None:
    bound = 0.02 if form.bits == 8 else 0.15
    weights = layer(form, *size, bias=False).dequantised(torch.float32)
    assert weights.shape == size
    assert error(weights, matrix(*size)) < bound


def test_scales_are_the_same_numbers_in_float16_and_bfloat16() -> None:
    made = layer(WeightFormat(bits=4, group_size=32, asymmetric=True))
    for numbers in (made.scales, made.centres):
        assert numbers is not None
        assert torch.equal(numbers.bfloat16().half(), numbers)


def test_scales_of_four_bits_are_better_than_those_that_fit_the_largest_weight() -> None:
    weight = matrix(256, 256)
    groups = weight.view(256, 8, 32)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    q4_0 = (groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8)
    ours = layer(WeightFormat(bits=4, group_size=32), 256, 256).dequantised(torch.float32)
    assert error(ours, weight) < 0.95 * error(q4_0.flatten(1), weight)


def test_runtimes_that_want_positive_scales_get_them() -> None:
    form = WeightFormat(bits=4, group_size=32)
    assert bool((quantise(matrix(64, 64), form).scales < 0).any())
    assert bool((quantise(matrix(64, 64), form, negative_scales=False).scales > 0).all())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_and_extremes_stay_finite(form: WeightFormat) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 3], weight[3] = 1e-9, 3e4, -65504
    found = QuantizedLinear(quantise(weight, form), None).dequantised(torch.float32)
    assert bool(found.isfinite().all())
    assert found[0].abs().max() == 0
    torch.testing.assert_close(found[3], weight[3], rtol=0.01, atol=0)


@BUILT
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("size", [(64, 256), (33, 50), (5, 300)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_panels_give_what_the_stored_form_gives_but_for_the_rounding_of_activations(
        form: WeightFormat, size: tuple[int, int], rows: int) -> None:
    made = layer(form, *size)
    x = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows))
    panels = running.PanelLinear(made)
    assert error(panels(x), made(x)) < 0.012
    torch.testing.assert_close(panels(torch.zeros(2, size[1])), made(torch.zeros(2, size[1])), rtol=0, atol=1e-4)
    assert panels(x[None]).shape == (1, rows, size[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*FORMATS, WeightFormat(bits=4, group_size=64, activations="int8"),
                                  WeightFormat(bits=8, activations="int8")], ids=str)
def test_without_kernels_aten_gives_what_the_stored_form_gives(form: WeightFormat, dtype: torch.dtype) -> None:
    made = layer(form).to(dtype)
    fast = running.fastest(made, dtype, with_kernels=False)
    if form.bits == 4 or form.group_size is None:
        assert isinstance(fast, running.AtenInt4Linear if form.bits == 4 else running.AtenInt8Linear)
    for rows in (1, 17):
        x = torch.randn(rows, 256).to(dtype)
        assert error(fast(x), made(x)) < (1e-5 if dtype == torch.float32 else 0.01)


def test_scaling_rows_after_the_product_gives_the_same() -> None:
    made = layer(WeightFormat(bits=8))
    x = torch.randn(5, 256)
    assert error(running.RowScaledLinear(made, torch.float32)(x), made(x)) < 1e-5


def test_sizes_that_aten_does_not_take_are_multiplied_as_they_are_stored() -> None:
    for made in (layer(FORMATS[2], 60, 256), layer(FORMATS[2], 64, 250), layer(FORMATS[1])):
        assert running.fastest(made, torch.float32, with_kernels=False) is made


@BUILT
def test_preparing_a_model_lets_the_stored_form_go() -> None:
    model = nn.Sequential(layer(FORMATS[2]), layer(FORMATS[2], 16, 64))
    running.prepare(model, torch.float32)
    assert [name for name, _ in model.named_buffers()] == ["0.packed", "1.packed"]
    assert sum(buffer.nbytes for buffer in model.buffers()) == 64 * (128 + 16) + 16 * (32 + 4)


def test_dynamic_activations_are_rounded_row_by_row() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.3], [5.0, 2.0, 1.0], [-3.0, -2.0, -1.0]])
    rounded = rounded_rows(x)
    steps = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
    assert rounded[0].tolist() == [0, 0, 0]
    assert bool(((rounded - x).abs().amax(1) <= steps * 0.5001 + 1e-9).all())
    made = layer(WeightFormat(bits=4, group_size=32, activations="int8"))
    x = torch.randn(3, 256)
    expected = nn.functional.linear(rounded_rows(x), made.dequantised(torch.float32), made.bias)
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_embedding_gives_the_rows_of_its_matrix(form: WeightFormat) -> None:
    made = QuantizedEmbedding(quantise(matrix(20, 48), form), torch.bfloat16)
    tokens = torch.tensor([3, 3, 19, 0])
    assert torch.equal(made(tokens), made.dequantised(torch.bfloat16)[tokens])


@pytest.mark.parametrize("values", [
    {"bits": 3}, {"bits": 4.0}, {"bits": 4, "group_size": 0}, {"bits": 4, "group_size": 48},
    {"bits": 4, "group_size": 3.5}, {"bits": 8, "activations": "int7"}, {"bits": 8, "asymmetric": 1}])
def test_an_impossible_format_is_refused(values: dict[str, Any]) -> None:
    whole = {"bits": 4, "group_size": 32, "asymmetric": False, "activations": "float", **values}
    with pytest.raises(TorchchatError):
        format_from_json(whole)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    form, good = FORMATS[2], quantise(matrix(4, 64), FORMATS[2])
    for values, scales, centres in ((good.values[:, :5], good.scales, None), (good.values, good.scales.float(), None),
                                    (good.values, good.scales[:2], None), (good.values, good.scales, good.scales),
                                    (good.values.to(torch.int8), good.scales, None)):
        with pytest.raises(TorchchatError, match="quantised weights"):
            IntegerWeights(format=form, columns=64, values=values, scales=scales, centres=centres)


def test_converting_a_module_changes_activations_and_not_what_the_integers_mean() -> None:
    form = WeightFormat(bits=8, asymmetric=True)
    weights = quantise(torch.randn(7, 64, generator=torch.Generator().manual_seed(0)), form)
    module = nn.Sequential(QuantizedEmbedding(weights, torch.float32), QuantizedLinear(weights, torch.zeros(7)))
    expected = module[0].dequantised(torch.float32)
    module.to(torch.bfloat16)
    assert [layer.scales.dtype for layer in module] == [layer.centres.dtype for layer in module] == [torch.float16] * 2
    assert torch.equal(module[1].dequantised(torch.float32), expected)
    assert module(torch.tensor([3])).dtype == module[1].bias.dtype == torch.bfloat16
