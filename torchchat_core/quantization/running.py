"""From layers as they are stored to layers that run fast: core's CPU kernels, or ATen's products of packed weights.

`prepare` is for executors, once, when a model is loaded. The weights are packed for the product that will be used, and
what they were packed from is let go. What they stand for does not change.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchchat_core import kernels
from torchchat_core.kernels.layers import joined_bias
from torchchat_core.quantization.layers import GROUP_STEP, QuantizedLinear, rounded_rows

ATEN_GROUPS = (32, 64, 128, 256)  # that the products of four-bit weights take
# Elsewhere core's kernels are plain C++, and ATen's own are faster where they take the weights.
HAS_KERNEL_INSTRUCTIONS = platform.machine().lower() in ("x86_64", "amd64")
TILE_ROWS, TILE_COLUMNS = 8, 128  # of tinygemm, with eight inner tiles
INNER_TILES = 8
TINYGEMM_ROWS = 24  # beyond, dequantising is quicker (tools/compare_cuda.py)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the quantised linear layers of `model` by the fastest ones for activations of `dtype`.

    One layer at a time, so that no more than one stands in memory twice.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    size = sum(model.get_submodule(name).get_buffer("values").nbytes for name in names)
    with_kernels = bool(names) and kernels.available(building=size >= kernels.WORTH_BUILDING)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(name, fastest(layer, dtype, with_kernels))


def fastest(layer: QuantizedLinear, dtype: torch.dtype, with_kernels: bool) -> nn.Module:
    """The layer itself where nothing is known that multiplies its weights as they are."""
    device = layer.values.device.type
    if device == "cpu" and with_kernels and HAS_KERNEL_INSTRUCTIONS:
        return PanelLinear(layer)
    if device == "cpu" and _one_scale_a_row(layer):
        return AtenInt8Linear(layer, dtype)
    if device == "cpu" and _whole_groups_of_four_bits(layer) and layer.rows % 16 == 0:
        return AtenInt4Linear(layer, dtype)
    if device == "cpu" and with_kernels:
        return PanelLinear(layer)
    if device == "cuda":
        return _fastest_on_cuda(layer, dtype)
    return layer


def _fastest_on_cuda(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    if _whole_groups_of_four_bits(layer) and _fits_tinygemm(layer, dtype):
        return TinygemmLinear(layer, dtype)
    if HAS_TRITON and layer.columns % GROUP_STEP == 0:
        return TritonLinear(layer)
    if _one_scale_a_row(layer) and dtype != torch.float16:
        return RowScaledLinear(layer, dtype)
    return layer


def _one_scale_a_row(layer: QuantizedLinear) -> bool:
    return layer.format.bits == 8 and layer.format.group_size is None and not layer.format.asymmetric


def _whole_groups_of_four_bits(layer: QuantizedLinear) -> bool:
    size = layer.format.group_size
    return layer.format.bits == 4 and size in ATEN_GROUPS and layer.columns % size == 0


def _fits_tinygemm(layer: QuantizedLinear, dtype: torch.dtype) -> bool:
    """Its tiles are those of GPUs from Ampere on."""
    whole = layer.rows % TILE_ROWS == 0 and layer.columns % TILE_COLUMNS == 0
    return dtype == torch.bfloat16 and whole and torch.cuda.get_device_capability(layer.values.device) >= (8, 0)


class RunningLinear(nn.Module):
    """x [..., in] -> [..., out], with whatever rows there are as one matrix."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class PanelLinear(RunningLinear):
    """Core's CPU kernel: activations are rounded to int8 in blocks of 32, as llama.cpp does, and multiplied as such."""

    packed: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        form, blocks = layer.format, -(-layer.columns // kernels.BLOCK_COLUMNS)
        self.bits, self.asymmetric = form.bits, form.asymmetric
        self.group_size = form.group_size or blocks * kernels.BLOCK_COLUMNS
        offsets = None
        if layer.centres is not None:
            offsets = (layer.centres.float() - form.middle * layer.scales.float()).half()
        self.register_buffer("packed", torch.ops.torchchat.pack_quantized(
            layer.values, layer.scales.half(), offsets, layer.columns, self.bits, self.group_size))

    def multiply(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.torchchat.quantized_linear(x, self.packed, self.bias, self.out_features, self.bits,
                                                               self.group_size, self.asymmetric)
        return product


    def joined(self, layers: Sequence[nn.Module]) -> nn.Module | None:
        """A `kernels.layers.Joinable`: layers of one format."""
        alike = [layer for layer in layers if isinstance(layer, PanelLinear) and layer.form == self.form
                 and (layer.bias is None) == (self.bias is None)]
        return PanelLinears(alike) if len(alike) == len(layers) else None

    @property
    def form(self) -> tuple[int, int, bool]:
        return self.bits, self.group_size, self.asymmetric


class PanelLinears(nn.Module):
    """x [n, in] -> the outputs of several `PanelLinear`, whose weights stay where they are."""

    bias: Tensor | None

    def __init__(self, layers: Sequence[PanelLinear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        for index, layer in enumerate(layers):
            self.register_buffer(f"packed{index}", layer.packed)
        self.bits, self.group_size, self.asymmetric = layers[0].form
        self.register_buffer("bias", joined_bias([layer.bias for layer in layers]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        packed = [getattr(self, f"packed{index}") for index in range(len(self.sizes))]
        products: tuple[Tensor, ...] = torch.ops.torchchat.quantized_linears(
            x, packed, self.bias, self.sizes, self.bits, self.group_size, self.asymmetric).split(self.sizes, 1)
        return products


class TritonLinear(RunningLinear):
    """Core's GPU kernels, which read weights as they are stored, whatever their format and the dtype."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.stored = layer

    def multiply(self, x: Tensor) -> Tensor:
        from torchchat_core.kernels.triton_products import product

        return product(rounded_rows(x) if self.stored.format.activations == "int8" else x, self.stored, self.bias)


class EightBitRows(RunningLinear):
    """Eight-bit weights with one scale a row."""

    values: Tensor
    scales: Tensor

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__(layer)
        self.rounds = layer.format.activations == "int8"
        self.register_buffer("values", (layer.values ^ 128).view(torch.int8))  # less 128
        self.register_buffer("scales", layer.scales[:, 0].to(dtype))

    def multiply(self, x: Tensor) -> Tensor:
        x = rounded_rows(x) if self.rounds else x
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x [n, in] times the weights, without the bias."""
        raise NotImplementedError


class AtenInt8Linear(EightBitRows):
    """ATen's product, on the CPU."""

    def product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.values, self.scales)
        return product


class RowScaledLinear(EightBitRows):
    """The integers are multiplied in the activations' dtype, then scaled.

    Not in float16, whose sums of products with integers leave its range.
    """

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values.to(x.dtype)) * self.scales


class AtenInt4Linear(RunningLinear):
    """ATen's product with four-bit weights in groups, on the CPU."""

    packed: Tensor
    scales: Tensor
    group_size: int

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__(layer)
        self.group_size = layer.format.columns_of_group(layer.columns)
        self.rounds = layer.format.activations == "int8"
        centres = torch.zeros_like(layer.scales) if layer.centres is None else layer.centres
        pairs = torch.stack((layer.scales.to(dtype), centres.to(dtype)), dim=2)  # [rows, groups, 2]
        self.register_buffer("packed", self.pack(layer.stored()))
        self.register_buffer("scales", pairs.transpose(0, 1).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        product = self.product(rounded_rows(x) if self.rounds else x)
        return product if self.bias is None else product + self.bias

    def pack(self, stored: Tensor) -> Tensor:
        """The integers [rows, columns], as the product takes them."""
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored.int(), INNER_TILES)
        return packed

    def product(self, x: Tensor) -> Tensor:
        """x [n, in] times the weights, without the bias."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scales)
        return product


class TinygemmLinear(AtenInt4Linear):
    """ATen's product on CUDA, whose time grows with the rows: many are multiplied with dequantised weights."""

    def pack(self, stored: Tensor) -> Tensor:
        pairs = stored[:, ::2] << 4 | stored[:, 1::2]  # the even column in the upper half
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
        return packed

    def product(self, x: Tensor) -> Tensor:
        few = isinstance(x.shape[0], int) and x.shape[0] <= TINYGEMM_ROWS  # open in exported graphs
        if not few and HAS_TRITON and torch.version.hip is None:
            from torchchat_core.kernels.triton_products import dequantised_tiles

            return F.linear(x, dequantised_tiles(self.packed, self.scales, self.group_size))
        product: Tensor = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group_size, self.scales)
        return product
