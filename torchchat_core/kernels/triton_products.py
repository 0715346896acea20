"""Products with integer weights on a GPU, in Triton: of one row, of a few rows, and the weights themselves for many.

The weights are read as they are stored (`quantization.layers.IntegerWeights`): nothing is packed, whatever the group
size and the dtype. Columns are taken in pieces of 32, since every group is made of whole ones; of four bits, a byte
holds an even column in its lower half and the odd one behind it in its upper half.

Triton comes with PyTorch for CUDA on Linux. Its kernels are compiled when they first run, and kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchchat_core.quantization.layers import GROUP_STEP, QuantizedLinear

FEW_ROWS = 16  # up to here weights are multiplied as they are read; beyond, they are dequantised once for all rows
ROWS_OF_PROGRAM = 4  # of the weights, in the product of one row


@triton.jit  # type: ignore[untyped-decorator]
def _piece(values, scales, centres, row, rows, piece, pieces, columns, groups, group_pieces, BITS: tl.constexpr,
           CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]
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


@triton.jit  # type: ignore[untyped-decorator]
def _one_row(x, values, scales, centres, bias, out, rows, columns, groups, group_pieces, BITS: tl.constexpr,
             CENTRED: tl.constexpr, BIASED: tl.constexpr, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
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


@triton.jit  # type: ignore[untyped-decorator]
def _store(out, bias, row, rows, total, BIASED: tl.constexpr):  # type: ignore[no-untyped-def]
    at = row + tl.arange(0, 1)
    result = total + tl.zeros((1,), tl.float32)
    if BIASED:
        result += tl.load(bias + at, mask=at < rows, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=at < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _few_rows(x, values, scales, centres, bias, out, count, rows, columns, groups, group_size, BITS: tl.constexpr,
              CENTRED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [count, rows] = x [count, columns] weights^T + bias, count at most 16; a program has ROWS of the weights.

    COLUMNS divides neither the columns nor a group always: scales are taken column by column.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, 16)
    known_row, known_token = row < rows, token < count
    total = tl.zeros((16, ROWS), tl.float32)
    half = tl.arange(0, COLUMNS)
    step: tl.constexpr = 2 if BITS == 4 else 1
    for start in range(0, columns, COLUMNS * step):
        first = start + half * step
        there = first < columns
        group = row[:, None] * groups + first[None, :] // group_size
        inside = known_row[:, None] & there[None, :]
        scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
        at = row[:, None] * (columns // step) + (first // step)[None, :]
        stored = tl.load(values + at, mask=inside, other=0)
        x_at = token[:, None] * columns + first[None, :]
        seen = known_token[:, None] & there[None, :]
        if BITS == 4:
            weights = ((stored & 15).to(tl.float32) - 8.0) * scale
            others = ((stored >> 4).to(tl.float32) - 8.0) * scale
            if CENTRED:
                centre = tl.load(centres + group, mask=inside, other=0.0).to(tl.float32)
                weights, others = weights + centre, others + centre
            x1 = tl.load(x + x_at + 1, mask=seen, other=0.0)
            total += tl.dot(x1, tl.trans(others.to(x1.dtype)), input_precision="ieee")
        else:
            weights = (stored.to(tl.float32) - 128.0) * scale
            if CENTRED:
                weights = weights + tl.load(centres + group, mask=inside, other=0.0).to(tl.float32)
        x0 = tl.load(x + x_at, mask=seen, other=0.0)
        total += tl.dot(x0, tl.trans(weights.to(x0.dtype)), input_precision="ieee")
    if BIASED:
        total += tl.load(bias + row, mask=known_row, other=0.0).to(tl.float32)[None, :]
    tl.store(out + token[:, None] * rows + row[None, :], total.to(out.dtype.element_ty),
             mask=known_token[:, None] & known_row[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise(values, scales, centres, out, columns, groups, group_size, BITS: tl.constexpr, CENTRED: tl.constexpr,
                COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
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


def fits(layer: QuantizedLinear) -> bool:
    """Whether its rows are made of whole pieces."""
    return layer.columns % GROUP_STEP == 0


def product(x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
    """x [n, columns] -> [n, rows], in the dtype of x; sums are of float32."""
    count, rows, columns = x.shape[0], layer.rows, layer.columns
    if count > FEW_ROWS:
        return torch.nn.functional.linear(x, dequantised(layer, x.dtype), bias)
    out = torch.empty((count, rows), dtype=x.dtype, device=x.device)
    groups, size = layer.scales.shape[1], layer.format.columns_of_group(columns)
    centres = layer.scales if layer.centres is None else layer.centres  # a pointer that is not read
    flags = {"BITS": layer.format.bits, "CENTRED": layer.centres is not None, "BIASED": bias is not None}
    x, added = x.contiguous(), out if bias is None else bias
    if count == 1:
        _one_row[(-(-rows // ROWS_OF_PROGRAM),)](
            x, layer.values, layer.scales, centres, added, out, rows, columns, groups, size // GROUP_STEP, **flags,
            PIECES=64, num_warps=2)
        return out
    block = 32 if rows >= 8192 else 16
    _few_rows[(-(-rows // block),)](
        x, layer.values, layer.scales, centres, added, out, count, rows, columns, groups, size, **flags, ROWS=block,
        COLUMNS=64, num_warps=4, num_stages=4)
    return out


def dequantised(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """`QuantizedLayer.dequantised` in one pass: [rows, columns]."""
    rows, columns, block = layer.rows, layer.columns, 1024
    out = torch.empty((rows, columns), dtype=dtype, device=layer.values.device)
    _dequantise[(rows, -(-columns // block))](
        layer.values, layer.scales, layer.scales if layer.centres is None else layer.centres, out, columns,
        layer.scales.shape[1], layer.format.columns_of_group(columns), BITS=layer.format.bits,
        CENTRED=layer.centres is not None, COLUMNS=block, num_warps=4)
    return out
