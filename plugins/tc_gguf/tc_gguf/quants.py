"""Numbers out of ggml's block formats, the same bit for bit as ggml's own code gives (ggml-quants.c, ggml-common.h).

A block is a row of bytes: one or more scales, and small whole numbers that are multiplied by them. Every product but
the last is exact in float32, so that the order of the factors does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError

# blocks [n, block_bytes] uint8, numbers [n, block_elements] float32 that are written, and returned. They are handed in
# because fresh memory for every piece of a large tensor would take longer than the arithmetic.
Dequantize = Callable[[Tensor, Tensor], Tensor]


def dequantizer(name: str) -> Dequantize:
    """What unpacks the blocks of the type of that name. Raises `TorchchatError` where torchchat does not know it."""
    if name not in DEQUANTIZERS:
        raise TorchchatError(f"tensors of type {name} are not read; known are {', '.join(DEQUANTIZERS)}",
                             "fetch a file of another quantisation type of the model, such as Q4_K_M or Q8_0")
    return DEQUANTIZERS[name]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte `start` of each block: [n, 1] float32."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _fields(packed: Tensor, bits: int) -> Tensor:
    """[..., bytes] -> [..., 8 / bits, bytes]: the lowest `bits` of all bytes, then the next ones, and so on.

    Two bytes at a time, as torch has fast shifts for 16 bits and not for 8.
    """
    pairs, mask = packed.view(torch.int16), ((1 << bits) - 1) * 0x0101
    return torch.stack([((pairs >> shift) & mask).view(torch.uint8) for shift in range(0, 8, bits)], -2)


# ---- plain numbers ------------------------------------------------------------------------------------------------


def _float32(blocks: Tensor, numbers: Tensor) -> Tensor:
    return numbers.copy_(blocks.view(torch.float32))


def _float16(blocks: Tensor, numbers: Tensor) -> Tensor:
    return numbers.copy_(blocks.view(torch.float16))


def _bfloat16(blocks: Tensor, numbers: Tensor) -> Tensor:
    return numbers.copy_(blocks.view(torch.bfloat16))


# ---- blocks of 32 -------------------------------------------------------------------------------------------------


def _q8_0(blocks: Tensor, numbers: Tensor) -> Tensor:
    return numbers.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, numbers: Tensor) -> Tensor:
    return numbers.copy_(_fields(blocks[:, 2:], 4).flatten(1)).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, numbers: Tensor) -> Tensor:
    return numbers.copy_(_fields(blocks[:, 4:], 4).flatten(1)).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _fifth_bits(packed: Tensor) -> Tensor:
    """[n, 4] -> [n, 32]: bit i of each four bytes together, moved to where it adds 16."""
    return _fields(packed, 1).transpose(1, 2).flatten(1) << 4


def _q5_0(blocks: Tensor, numbers: Tensor) -> Tensor:
    whole = _fields(blocks[:, 6:], 4).flatten(1) | _fifth_bits(blocks[:, 2:6])
    return numbers.copy_(whole).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, numbers: Tensor) -> Tensor:
    whole = _fields(blocks[:, 8:], 4).flatten(1) | _fifth_bits(blocks[:, 4:8])
    return numbers.copy_(whole).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice what E2M1 stands for


def _look_up(numbers: Tensor, indices: Tensor, values: tuple[int, ...]) -> Tensor:
    table = torch.tensor(values, dtype=torch.float32)
    torch.index_select(table, 0, indices.flatten().int(), out=numbers.view(-1))
    return numbers


def _iq4_nl(blocks: Tensor, numbers: Tensor) -> Tensor:
    return _look_up(numbers, _fields(blocks[:, 2:], 4).flatten(1), IQ4_VALUES).mul_(_half(blocks, 0))


def _mxfp4(blocks: Tensor, numbers: Tensor) -> Tensor:
    exponents = blocks[:, :1].int()  # of two, biased by 127; halved, as the values are doubled
    halved = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    indices = _fields(blocks[:, 1:].contiguous(), 4).flatten(1)
    return _look_up(numbers, indices, MXFP4_VALUES).mul_(halved.view(torch.float32))


# ---- super-blocks of 256 ------------------------------------------------------------------------------------------


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: twelve bytes [n, 12] hold eight scales and eight minima of six bits, each [n, 8]."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scales, minima


def _scaled(numbers: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """numbers [n, 256] float32 times scales less minima, [n, groups] each: one for each run of 256 / groups numbers."""
    grouped = numbers.view(len(numbers), scales.shape[1], -1)
    grouped.mul_(scales[:, :, None])
    if minima is not None:
        grouped.sub_(minima[:, :, None])
    return numbers


def _q4_k(blocks: Tensor, numbers: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    whole = _fields(blocks[:, 16:].unflatten(1, (4, 32)), 4).flatten(1)
    return _scaled(numbers.copy_(whole), scales * _half(blocks, 0), minima * _half(blocks, 2))


def _q5_k(blocks: Tensor, numbers: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    high = _fields(blocks[:, 16:48], 1) << 4  # [n, 8, 32]
    whole = _fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).flatten(1) | high.flatten(1)
    return _scaled(numbers.copy_(whole), scales * _half(blocks, 0), minima * _half(blocks, 2))


def _q2_k(blocks: Tensor, numbers: Tensor) -> Tensor:
    whole = _fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2).flatten(1)
    scales = blocks[:, :16]
    return _scaled(numbers.copy_(whole), (scales & 15) * _half(blocks, 80), (scales >> 4) * _half(blocks, 82))


def _q3_k(blocks: Tensor, numbers: Tensor) -> Tensor:
    whole = _fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).flatten(1)
    whole |= _fields(blocks[:, :32], 1).flatten(1) << 2
    scales = _fields(blocks[:, 96:104], 4).flatten(1) | (_fields(blocks[:, 104:108], 2).flatten(1) << 4)  # [n, 16]
    return _scaled(numbers.copy_(whole).sub_(4), (scales.float() - 32) * _half(blocks, 108))


def _q6_k(blocks: Tensor, numbers: Tensor) -> Tensor:
    low = _fields(blocks[:, :128].unflatten(1, (2, 64)), 4).flatten(1)
    whole = low | (_fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1) << 4)
    scales = blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)  # [n, 16]
    return _scaled(numbers.copy_(whole).sub_(32), scales)


def _iq4_xs(blocks: Tensor, numbers: Tensor) -> Tensor:
    low = _fields(blocks[:, 4:8], 4).transpose(1, 2).flatten(1)  # [n, 8]
    high = _fields(blocks[:, 2:4], 2).transpose(1, 2).flatten(1)
    scales = ((low | (high << 4)).float() - 32) * _half(blocks, 0)
    whole = _fields(blocks[:, 8:].unflatten(1, (8, 16)), 4).flatten(1)
    return _scaled(_look_up(numbers, whole, IQ4_VALUES), scales)


DEQUANTIZERS: Mapping[str, Dequantize] = {
    "F32": _float32, "F16": _float16, "BF16": _bfloat16,
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}
