"""Linear and embedding layers with integer weights, in the form in which they are stored, exchanged and exported.

A weight is scale * (stored - middle) + centre: `stored` is unsigned and has 4 or 8 bits, `middle` is 8 or 128, and each
group of columns of a row has a scale and, where the format is asymmetric, a centre. Scales and centres that quantizers
make have eight significant bits, so that they are the same numbers in float16 and bfloat16, whatever multiplies them;
those that were taken from another format (`blocks`) have float16's eleven.

These layers compute what they mean by plain PyTorch, on every device. What runs fast is made of them by `running`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError, quoted

BITS = (4, 8)
GROUP_STEP = 32  # group sizes are multiples of what the CPU kernels round activations in
SMALLEST_STEP = 1e-12  # of rounded activations: a row of zeros stays one


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the integers of a matrix stand for its weights."""

    bits: int  # 4 or 8
    group_size: int | None = None  # columns that share one scale; None: a whole row
    asymmetric: bool = False  # whether groups have centres
    activations: Literal["float", "int8"] = "float"  # "int8": rounded, row by row, before they are multiplied

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in BITS:  # 4.0 is equal to 4
            raise TorchchatError(f"a weight of {quoted(self.bits)} bits; 4 and 8 are known")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or size <= 0 or size % GROUP_STEP):
            raise TorchchatError(f"the group size is {quoted(size)}; it has to be a multiple of {GROUP_STEP}, "
                                 "or none for one scale a row")
        if not isinstance(self.asymmetric, bool) or self.activations not in ("float", "int8"):
            raise TorchchatError(f"{quoted(asdict(self))} is not a format of quantized weights")

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    def groups(self, columns: int) -> int:
        """Groups in a row of so many columns; the last one may be shorter than the others."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def columns_of_group(self, columns: int) -> int:
        return columns if self.group_size is None else min(self.group_size, columns)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that such a matrix is stored as: shape and dtype by name."""
        values = (rows, columns if self.bits == 8 else (columns + 1) // 2)
        scales = (rows, self.groups(columns))
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "values": (values, torch.uint8), "scales": (scales, torch.float16)}
        return {**shapes, "centres": (scales, torch.float16)} if self.asymmetric else shapes


@dataclass(frozen=True, kw_only=True)
class IntegerWeights:
    """A matrix [rows, columns] as integers. Raises `TorchchatError` where its tensors do not belong together."""

    format: WeightFormat
    columns: int
    values: Tensor  # uint8 [rows, columns]; of 4 bits [rows, (columns + 1) // 2], even columns in the lower halves
    scales: Tensor  # float16 [rows, groups]
    centres: Tensor | None = None  # float16 [rows, groups], where the format is asymmetric

    def __post_init__(self) -> None:
        rows = self.values.shape[0] if self.values.dim() else 0
        found = {"values": self.values, "scales": self.scales}
        found |= {} if self.centres is None else {"centres": self.centres}
        wanted = self.format.shapes(rows, self.columns)
        if found.keys() != wanted.keys():
            raise TorchchatError(f"quantised weights have {', '.join(found)}; {', '.join(wanted)} are needed")
        for name, (shape, dtype) in wanted.items():
            if tuple(found[name].shape) != shape or found[name].dtype != dtype:
                raise TorchchatError(f"the {name} of quantised weights are {_described(found[name])}; they have to be "
                                     f"{str(dtype).removeprefix('torch.')} {list(shape)}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def packed_values(stored: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] -> as they are kept: of 4 bits two to a byte, the even column in the lower half."""
    if bits == 8:
        return stored
    padded = F.pad(stored, (0, stored.shape[1] % 2))
    return padded[:, ::2] | padded[:, 1::2] << 4


def unpacked_values(values: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `packed_values`."""
    if bits == 8:
        return values
    return torch.stack((values & 15, values >> 4), dim=2).flatten(1)[:, :columns]


def rounded_rows(x: Tensor) -> Tensor:
    """Activations [n, columns] rounded to int8, each row with a scale and a zero point of its own (dynamic).

    As ExecuTorch and torchao do it: the 256 steps span the row's values and zero, and zero is one of them.
    """
    values = x.float()
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 255).clamp(min=SMALLEST_STEP)
    zero = (-128 - low / step).round().clamp(-128, 127)
    return (((values / step).round() + zero).clamp(-128, 127) - zero).mul(step).to(x.dtype)


class QuantizedLayer(nn.Module):
    """What linear and embedding layers with integer weights have in common: buffers `values`, `scales`, `centres`."""

    values: Tensor
    scales: Tensor
    centres: Tensor | None

    def __init__(self, weights: IntegerWeights) -> None:
        super().__init__()
        self.format = weights.format
        self.columns = weights.columns
        self.register_buffer("values", weights.values)
        self.register_buffer("scales", weights.scales)
        self.register_buffer("centres", weights.centres)

    @property
    def rows(self) -> int:
        return int(self.values.shape[0])

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """Moves with the module to another device; what the integers mean stays as it is, in float16."""
        scales, centres = self.scales, self.centres
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            device = self.scales.device
            self.scales, self.centres = scales.to(device), None if centres is None else centres.to(device)
        return self

    def stored(self) -> Tensor:
        """The integers, uint8 [rows, columns]."""
        return unpacked_values(self.values, self.columns, self.format.bits)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights [rows, columns] that the integers stand for; computed in float32, then rounded to `dtype`."""
        return meaning(self.values, self.scales, self.centres, self.columns, self.format).to(dtype)


def meaning(values: Tensor, scales: Tensor, centres: Tensor | None, columns: int, form: WeightFormat) -> Tensor:
    """The weights, float32 [rows, columns], that the parts of an `IntegerWeights` stand for."""
    size, groups = form.columns_of_group(columns), form.groups(columns)
    stored = unpacked_values(values, columns, form.bits)
    filled = F.pad(stored, (0, groups * size - columns)).view(-1, groups, size)
    weights = (filled.float() - form.middle) * scales.float().unsqueeze(2)  # [rows, groups, size]
    if centres is not None:
        weights = weights + centres.float().unsqueeze(2)
    return weights.flatten(1)[:, :columns]


class QuantizedLinear(QuantizedLayer):
    """x [..., in] -> [..., out]. The bias, where there is one, is as it was."""

    def __init__(self, weights: IntegerWeights, bias: Tensor | None) -> None:
        super().__init__(weights)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        if self.format.activations == "int8":
            x = rounded_rows(x)
        return F.linear(x, self.dequantised(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {_words(self.format)}"


class QuantizedEmbedding(QuantizedLayer):
    """tokens [n] -> rows [n, columns] of the matrix, in `dtype`."""

    def __init__(self, weights: IntegerWeights, dtype: torch.dtype) -> None:
        super().__init__(weights)
        self.dtype = dtype

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        super()._apply(function, recurse)
        self.dtype = function(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        return self

    @property
    def num_embeddings(self) -> int:
        return self.rows

    @property
    def embedding_dim(self) -> int:
        return self.columns

    def forward(self, tokens: Tensor) -> Tensor:
        centres = None if self.centres is None else self.centres[tokens]
        return meaning(self.values[tokens], self.scales[tokens], centres, self.columns, self.format).to(self.dtype)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.rows}, embedding_dim={self.columns}, {_words(self.format)}"


def _words(form: WeightFormat) -> str:
    return ", ".join(f"{name}={value}" for name, value in asdict(form).items())


def format_from_json(content: Any) -> WeightFormat:
    """A `WeightFormat` from what `dataclasses.asdict` made of one. Raises `TorchchatError` for anything else."""
    names = ("bits", "group_size", "asymmetric", "activations")
    if not isinstance(content, dict) or content.keys() != set(names):
        raise TorchchatError(f"{quoted(content)} is not a format of quantized weights; expected {', '.join(names)}")
    if isinstance(content["bits"], bool) or isinstance(content["group_size"], bool):
        raise TorchchatError(f"{quoted(content)} is not a format of quantized weights")
    return WeightFormat(**content)
