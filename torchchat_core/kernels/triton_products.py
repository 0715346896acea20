# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-any-return"
"""Products with integer weights on a GPU, in Triton: of one row; for more, the weights are dequantised once for all.

The weights are read as they are stored (`quantization.layers.IntegerWeights`): nothing is packed, whatever the group
size and the dtype. Columns are taken in pieces of 32, since every group is made of whole ones; of four bits, a byte
holds an even column in its lower half and the odd one behind it in its upper half.

Triton comes with PyTorch for CUDA on Linux. Its kernels are compiled when they first run, and kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from torchchat_core.quantization.layers import GROUP_STEP, QuantizedLinear
from torchchat_core.quantization.running import TILE_COLUMNS, TILE_ROWS

ROWS_OF_PROGRAM = 4  # of the weights, in the product of one row
BLOCK = 1024  # columns that a program dequantises


@triton.jit
def _piece(values, scales, centres, row, rows, piece, pieces, columns, groups, group_pieces, BITS: tl.constexpr,
           CENTRED: tl.constexpr):
    """Pieces of one row: even and odd columns, each [pieces, 16] float32, of eight bits as halves of the piece."""
    column = tl.arange(0, 16)
    row = tl.minimum(row, rows - 1)  # what a program has beyond the last row is not stored
    there = piece < pieces
    group = row * groups + piece // group_pieces
    scale = tl.load(scales + group, mask=there, other=0.0).to(tl.float32)[:, None]
    if BITS == 4:
        at = row * (columns // 2) + piece[:, None] * 16 + column[None, :]
        both = tl.load(values + at, mask=there[:, None], other=0)
        first, second = (both & 15).to(tl.float32) - 8.0, (both >> 4).to(tl.float32) - 8.0
    else:
        at = row * columns + piece[:, None] * 32 + column[None, :]
        first = tl.load(values + at, mask=there[:, None], other=0).to(tl.float32) - 128.0
        second = tl.load(values + at + 16, mask=there[:, None], other=0).to(tl.float32) - 128.0
    first, second = first * scale, second * scale
    if CENTRED:
        centre = tl.load(centres + group, mask=there, other=0.0).to(tl.float32)[:, None]
        first, second = first + centre, second + centre
    return first, second


@triton.jit
def _one_row(x, values, scales, centres, bias, out, rows, columns, groups, group_pieces, BITS: tl.constexpr,
             CENTRED: tl.constexpr, BIASED: tl.constexpr, PIECES: tl.constexpr):
    """out [rows] = weights [rows, columns] x [columns] + bias; a program has four rows, and x in registers for them."""
    row = tl.program_id(0).to(tl.int64) * 4
    pieces = columns // 32
    column = tl.arange(0, 16)
    sum0 = tl.zeros((PIECES, 16), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        there = (piece < pieces)[:, None]
        if BITS == 4:
            at = piece[:, None] * 32 + column[None, :] * 2
            other = at + 1
        else:
            at = piece[:, None] * 32 + column[None, :]
            other = at + 16
        x0 = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        x1 = tl.load(x + other, mask=there, other=0.0).to(tl.float32)
        a, b = _piece(values, scales, centres, row, rows, piece, pieces, columns, groups, group_pieces, BITS, CENTRED)
        sum0 += a * x0 + b * x1
        a, b = _piece(values, scales, centres, row + 1, rows, piece, pieces, columns, groups, group_pieces, BITS,
                      CENTRED)
        sum1 += a * x0 + b * x1
        a, b = _piece(values, scales, centres, row + 2, rows, piece, pieces, columns, groups, group_pieces, BITS,
                      CENTRED)
        sum2 += a * x0 + b * x1
        a, b = _piece(values, scales, centres, row + 3, rows, piece, pieces, columns, groups, group_pieces, BITS,
                      CENTRED)
        sum3 += a * x0 + b * x1
    _store(out, bias, row, rows, tl.sum(sum0), BIASED)
    _store(out, bias, row + 1, rows, tl.sum(sum1), BIASED)
    _store(out, bias, row + 2, rows, tl.sum(sum2), BIASED)
    _store(out, bias, row + 3, rows, tl.sum(sum3), BIASED)


@triton.jit
def _store(out, bias, row, rows, total, BIASED: tl.constexpr):
    at = row + tl.arange(0, 1)
    result = total + tl.zeros((1,), tl.float32)
    if BIASED:
        result += tl.load(bias + at, mask=at < rows, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=at < rows)


@triton.jit
def _dequantise(values, scales, centres, out, columns, groups, group_size, BITS: tl.constexpr, CENTRED: tl.constexpr,
                COLUMNS: tl.constexpr):
    """out [rows, columns], a program for each row and COLUMNS of its columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    group = row * groups + column // group_size
    if BITS == 4:
        byte = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        both = tl.load(values + row * (columns // 2) + byte, mask=byte * 2 < columns, other=0)
        stored = tl.interleave(both & 15, both >> 4).to(tl.float32) - 8.0
    else:
        stored = tl.load(values + row * columns + column, mask=there, other=0).to(tl.float32) - 128.0
    weights = stored * tl.load(scales + group, mask=there, other=0.0).to(tl.float32)
    if CENTRED:
        weights += tl.load(centres + group, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, weights.to(out.dtype.element_ty), mask=there)


@triton.jit
def _dequantise_tiles(packed, pairs, out, rows, columns, group_size, COLUMNS: tl.constexpr):
    """As `_dequantise`, of weights in tinygemm's layout for NVIDIA's tensor cores: `dequantised_tiles`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    tile = (row // 8) * (columns // 128) + column // 128
    within = column % 16
    lane = (row % 8) * 4 + within // 2 % 4
    word = tl.load(packed + (tile * 32 + lane) * 4 + column % 128 // 32, mask=there, other=0)
    nibble = within % 2 * 4 + column % 32 // 16 * 2 + within // 8
    stored = ((word >> nibble * 4) & 15).to(tl.float32) - 8.0
    pair = pairs + ((column // group_size) * rows + row) * 2
    scale = tl.load(pair, mask=there, other=0.0).to(tl.float32)
    centre = tl.load(pair + 1, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (stored * scale + centre).to(out.dtype.element_ty), mask=there)


def product(x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
    """x [n, columns] -> [n, rows], in the dtype of x; sums are of float32. The columns are a multiple of 32.

    Where n is open, as in exported graphs, it counts as many.
    """
    if isinstance(x.shape[0], int) and x.shape[0] == 1:
        return one_row_product(x, layer.values, layer.scales, layer.centres, bias, layer.columns, layer.format.bits,
                               layer.format.columns_of_group(layer.columns))
    return F.linear(x, dequantised(layer, x.dtype), bias)


def dequantised(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """`QuantizedLayer.dequantised` in one pass: [rows, columns]."""
    return dequantised_values(layer.values, layer.scales, layer.centres, layer.columns, layer.format.bits,
                              layer.format.columns_of_group(layer.columns), dtype)


def _traced(kernel: Any) -> Any:
    """The kernel as graphs take it; the interpreter's functions are run as they are."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


@triton_op("torchchat::one_row_product", mutates_args={})
def one_row_product(x: Tensor, values: Tensor, scales: Tensor, centres: Tensor | None, bias: Tensor | None,
                    columns: int, bits: int, group_size: int) -> Tensor:
    """x [1, columns] times the weights of an `IntegerWeights`: [1, rows]."""
    rows = values.shape[0]
    out = torch.empty((1, rows), dtype=x.dtype, device=x.device)
    _traced(_one_row)[(-(-rows // ROWS_OF_PROGRAM),)](
        x.contiguous(), values, scales, scales if centres is None else centres, scales if bias is None else bias, out,
        rows, columns, scales.shape[1], group_size // GROUP_STEP, BITS=bits, CENTRED=centres is not None,
        BIASED=bias is not None, PIECES=16 if bits == 4 else 32, num_warps=2)
    return out


@triton_op("torchchat::dequantised_values", mutates_args={})
def dequantised_values(values: Tensor, scales: Tensor, centres: Tensor | None, columns: int, bits: int,
                       group_size: int, dtype: torch.dtype) -> Tensor:
    """The weights [rows, columns] of an `IntegerWeights`."""
    rows = values.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=values.device)
    _traced(_dequantise)[(rows, -(-columns // BLOCK))](
        values, scales, scales if centres is None else centres, out, columns, scales.shape[1], group_size, BITS=bits,
        CENTRED=centres is not None, COLUMNS=BLOCK, num_warps=4)
    return out


@triton_op("torchchat::dequantised_tiles", mutates_args={})
def dequantised_tiles(packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """The weights [rows, columns], in the dtype of `pairs`, of ATen's `_weight_int4pack_mm` on NVIDIA's GPUs.

    `packed` [rows / 8, columns / 128, 32, 4] int32: tiles of 8 rows and 128 columns, as `_convert_weight_to_int4pack`
    makes them with eight inner tiles: of a row, the lane 4 row + l has the columns 2l, 2l + 8 and those behind them of
    each 16, two sixteens to a word, even columns in its lower half. `pairs` [groups, rows, 2] are scales and centres.
    """
    rows, columns = packed.shape[0] * TILE_ROWS, packed.shape[1] * TILE_COLUMNS
    out = torch.empty((rows, columns), dtype=pairs.dtype, device=packed.device)
    _traced(_dequantise_tiles)[(rows, -(-columns // BLOCK))](packed, pairs, out, rows, columns, group_size,
                                                             COLUMNS=BLOCK, num_warps=4)
    return out
