"""Block formats of GGUF whose integers core's layers hold as they are.

Q4_0 and Q8_0 mean the same here, bit for bit: scale * (stored - middle). Q4_1 and Q4_K mean scale * stored + minimum,
which becomes scale * (stored - 8) + centre with centre = 8 * scale + minimum. The centre, and Q4_K's scale, which is a
float16 times six bits, are rounded to float16: a weight moves by less than a hundredth of a step of its group, or by
2^-11 of the centre where that is more.

The layouts are those of ggml-quants.c and ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchchat_core import kernels
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.quantization.layers import IntegerWeights, WeightFormat, meaning
from torchchat_core.specs import PackedTensor

PIECE = 1 << 20  # bytes that PyTorch takes apart at a time: what is in between stays in the processor's cache


@dataclass(frozen=True)
class Parts:
    """Blocks taken apart, in the order of the columns."""

    values: Tensor  # uint8 [blocks, bytes], as `IntegerWeights` has them
    scales: Tensor  # float32 [blocks, groups]
    centres: Tensor | None = None  # float32 [blocks, groups]


@dataclass(frozen=True)
class BlockFormat:
    """How rows of blocks become integer weights."""

    columns: int  # in a block
    bytes: int  # of a block
    weights: WeightFormat
    take_apart: Callable[[Tensor], Parts]  # of blocks uint8 [blocks, bytes]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte `start` of each block: float32 [blocks, 1]."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _neighbours(halves: Tensor) -> Tensor:
    """[..., n] with the first n columns in the lower halves, the next n in the upper -> [..., 2 * n / 2], two
    neighbours in each byte, the even one in the lower half. Two bytes at a time."""
    pairs = halves.contiguous().view(torch.int16)  # short runs of bytes are slow to go through more than once
    first = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    second = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)
    return torch.stack((first, second), -2).flatten(-2).to(torch.uint8)


def _q8_0(blocks: Tensor) -> Parts:
    return Parts(blocks[:, 2:].contiguous() ^ 128, _half(blocks, 0))


def _q4_0(blocks: Tensor) -> Parts:
    return Parts(_neighbours(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    scales = _half(blocks, 0)
    return Parts(_neighbours(blocks[:, 4:]), scales, 8 * scales + _half(blocks, 2))


def _q4_k(blocks: Tensor) -> Parts:
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1) * _half(blocks, 0)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1) * _half(blocks, 2)
    return Parts(_neighbours(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1), scales, 8 * scales - minima)


_FOUR_BITS, _WITH_CENTRES = WeightFormat(bits=4, group_size=32), WeightFormat(bits=4, group_size=32, asymmetric=True)
FORMATS = {
    "q4_0": BlockFormat(32, 18, _FOUR_BITS, _q4_0),
    "q4_1": BlockFormat(32, 20, _WITH_CENTRES, _q4_1),
    "q8_0": BlockFormat(32, 34, WeightFormat(bits=8, group_size=32), _q8_0),
    "q4_k": BlockFormat(256, 144, _WITH_CENTRES, _q4_k),
}


def format_of(packed: PackedTensor) -> BlockFormat:
    """Raises `TorchchatError` for a format that is not known here, and for data of another size than the shape's."""
    form = FORMATS.get(packed.kind)
    if form is None:
        raise TorchchatError(f"there is no block format {quoted(packed.kind)} here; known are {', '.join(FORMATS)}")
    rows, columns = packed.shape
    wanted = (rows, columns // form.columns * form.bytes)
    if columns % form.columns or tuple(packed.data.shape) != wanted or packed.data.dtype != torch.uint8:
        raise TorchchatError(f"a matrix {list(packed.shape)} in {packed.kind} has data {list(packed.data.shape)}; they "
                             f"have to be bytes {list(wanted)}")
    return form


def integer_weights(packed: PackedTensor) -> IntegerWeights | None:
    """The matrix in the form of core's layers; None where its scales are not numbers that float16 has.

    Raises `TorchchatError` as `format_of` does.
    """
    form, (rows, columns) = format_of(packed), packed.shape
    shapes = form.weights.shapes(rows, columns)
    made = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    if kernels.available(building=False):
        torch.ops.torchchat.take_apart_ggml(packed.data.view(-1, form.bytes), packed.kind, made["values"],
                                            made["scales"], made.get("centres"))
    else:
        _take_apart(packed.data, form, made)
    if not all(made[name].isfinite().all() for name in made if name != "values"):
        return None
    return IntegerWeights(format=form.weights, columns=columns, **made)


def _take_apart(data: Tensor, form: BlockFormat, out: Mapping[str, Tensor]) -> None:
    step = max(1, PIECE // data.shape[1])
    for start in range(0, len(data), step):
        rows = slice(start, start + step)
        parts = form.take_apart(data[rows].reshape(-1, form.bytes))
        for name, part in (("values", parts.values), ("scales", parts.scales), ("centres", parts.centres)):
            if part is not None:
                out[name][rows].copy_(part.view(out[name][rows].shape))


class BlockEmbedding(nn.Module):
    """tokens [n] -> rows [n, columns] of a matrix that stays mapped to its file, in `dtype`.

    Only rows that are asked for are ever in memory, and they are what the file means: nothing is rounded to float16.
    """

    blocks: Tensor

    def __init__(self, packed: PackedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.kind = format_of(packed), packed.kind
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype = dtype
        self.register_buffer("blocks", packed.data)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.format.take_apart(self.blocks[tokens].view(-1, self.format.bytes))
        values, scales = parts.values.view(len(tokens), -1), parts.scales.view(len(tokens), -1)
        centres = None if parts.centres is None else parts.centres.view(len(tokens), -1)
        return meaning(values, scales, centres, self.embedding_dim, self.format.weights).to(self.dtype)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, kind={self.kind}"
