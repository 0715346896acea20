"""The GPU's products give what the integers mean. They run on a GPU, or anywhere in Triton's interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_products.py
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from torchchat_core.quantization.layers import IntegerWeights, QuantizedLinear, WeightFormat
from torchchat_core.quantization.running import INNER_TILES, TinygemmLinear

pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for CUDA")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("this machine has no cuda", allow_module_level=True)
from torchchat_core.kernels.triton_products import dequantised, dequantised_tiles, product  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
FORMATS = [WeightFormat(bits=bits, group_size=size, asymmetric=asymmetric)
           for bits in (4, 8) for size in (32, 128, None) for asymmetric in (False, True)]


def layer(form: WeightFormat, rows: int, columns: int, biased: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randint(0, 256, shape, dtype=dtype, generator=generator) if dtype == torch.uint8
            else torch.rand(shape, generator=generator).to(dtype) / 16
            for name, (shape, dtype) in form.shapes(rows, columns).items()}
    bias = torch.randn(rows, generator=generator) if biased else None
    return QuantizedLinear(IntegerWeights(format=form, columns=columns, **made), bias).to(DEVICE)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    INTERPRETED, reason="the interpreter cuts bfloat16 off instead of rounding"))])
def test_dequantised_weights_are_those_of_the_layer(form: WeightFormat, dtype: torch.dtype) -> None:
    for columns in (96, 2080):
        weights = layer(form, 5, columns)
        torch.testing.assert_close(dequantised(weights, dtype), weights.dequantised(dtype))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_weights(form: WeightFormat, biased: bool) -> None:
    for rows, columns in ((10, 96), (33, 1056)):
        weights = layer(form, rows, columns, biased)
        for count in (1, 3):
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(DEVICE)
            torch.testing.assert_close(product(x, weights, weights.bias), weights(x), atol=1e-3, rtol=1e-3)


def tiles(stored: Tensor) -> Tensor:
    """[rows, columns] in the layout of NVIDIA's m16n8k16 products, as the docstring of `dequantised_tiles` says."""
    rows, columns = stored.shape
    packed = torch.zeros(rows // 8, columns // 128, 32, INNER_TILES // 2, dtype=torch.int64)
    for row in range(rows):
        for column in range(columns):
            sixteen, within = column % 128 // 16, column % 16
            lane = row % 8 * 4 + within % 8 // 2
            place = within % 2 * 4 + sixteen % 2 * 2 + within // 8
            packed[row // 8, column // 128, lane, sixteen // 2] |= int(stored[row, column]) << 4 * place
    return packed.to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("size", [32, 128])
def test_tiles_are_dequantised_whoever_made_them(size: int) -> None:
    weights = layer(WeightFormat(bits=4, group_size=size, asymmetric=True), 16, 256)
    pairs = torch.stack((weights.scales, weights.centres), 2).transpose(0, 1).float().contiguous()
    made = {"by hand": tiles(weights.stored().cpu()).to(DEVICE)}
    if DEVICE == "cuda":
        made["by ATen"] = TinygemmLinear(weights, torch.bfloat16).packed
    for who, packed in made.items():
        torch.testing.assert_close(dequantised_tiles(packed, pairs, size), weights.dequantised(torch.float32),
                                   msg=lambda text, who=who: f"{who}: {text}")
