"""Round-to-nearest, with scales that are chosen by the squared error they leave in the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from torchchat_core.quantization.layers import IntegerWeights, WeightFormat, packed_values

# Weights that are rounded at once. On the CPU few enough for PyTorch to use one thread: the threads are over the chunks
# here, which do not wait for each other, and whose temporary results stay in the processor's cache.
CHUNK = {"cpu": 1 << 15}
CHUNK_ELSEWHERE = 1 << 22
LARGEST = 65280.0  # the largest float16 with eight significant bits
# A group's extreme weight becomes this integer in the candidates for a four-bit scale (of the sign that has one more).
EXTREMES = (8.9, 8.4, 8.0, 7.6, 7.2, 6.8, 6.4)
SPANS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the range between a group's least and largest weight, where it has a centre


def quantise(weight: Tensor, form: WeightFormat, negative_scales: bool = True) -> IntegerWeights:
    """The integers that stand for `weight` [rows, columns]; where that is float, on the same device.

    Eight bits: the largest weight of a group becomes 127 or -127. Four bits: of several scales the one that leaves the
    smallest squared error, with the least-squares fit for its integers. A negative scale uses that there is a -8 and
    no 8, as llama.cpp's Q4_0 does; some runtimes (XNNPACK) take positive scales alone.
    """
    rows, columns = weight.shape
    made = {name: torch.empty(shape, dtype=dtype, device=weight.device)
            for name, (shape, dtype) in form.shapes(rows, columns).items()}
    step = max(1, CHUNK.get(weight.device.type, CHUNK_ELSEWHERE) // columns)

    def round_rows(start: int) -> None:
        _round_rows(weight[start : start + step], form, negative_scales,
                    {name: tensor[start : start + step] for name, tensor in made.items()})

    with ThreadPoolExecutor(torch.get_num_threads() if weight.device.type == "cpu" else 1) as pool:
        for _ in pool.map(round_rows, range(0, rows, step)):
            pass  # raises what the threads raised
    return IntegerWeights(format=form, columns=columns, **made)


@torch.no_grad()
def _round_rows(weight: Tensor, form: WeightFormat, negative_scales: bool, out: Mapping[str, Tensor]) -> None:
    groups = _groups(weight.float(), form)
    scales, centres = _scales(groups, form, negative_scales)
    integers = nearest_integers(groups, scales, centres, form)
    stored = (integers + form.middle).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    out["values"].copy_(packed_values(stored, form.bits))
    out["scales"].copy_(scales.squeeze(2))
    if centres is not None:
        out["centres"].copy_(centres.squeeze(2))


# ---- parts, for other ways of choosing scales and integers ---------------------------------------------------------


def searched_scales(group: Tensor, form: WeightFormat, negative_scales: bool, products: Tensor | None = None
                    ) -> tuple[Tensor, Tensor | None]:
    """Scales, and centres where the format has them, [rows, 1], as `quantise` gives them to a group [rows, columns].

    With the `products` of the inputs [columns, columns], the scales of symmetric formats are those that leave the
    smallest error in the outputs rather than in the weights.
    """
    if form.bits == 4 and not form.asymmetric:
        return eight_bits(_four_bit_scales(group, form, negative_scales, products)), None
    scales, centres = _scales(group[:, None], form, negative_scales)
    return scales[:, 0], None if centres is None else centres[:, 0]


def stored_weights(integers: Tensor, scales: Tensor, centres: Tensor | None, form: WeightFormat) -> IntegerWeights:
    """Of integers [rows, columns] from -middle to middle - 1, and scales and centres [rows, groups]."""
    stored = (integers + form.middle).to(torch.uint8)
    more = {} if centres is None else {"centres": eight_bits(centres).half()}
    return IntegerWeights(format=form, columns=integers.shape[1], values=packed_values(stored, form.bits),
                          scales=eight_bits(scales).half(), **more)


def rounded_with(weight: Tensor, scales: Tensor, centres: Tensor | None, form: WeightFormat) -> IntegerWeights:
    """`weight` [rows, columns] rounded to the nearest, with scales and centres [rows, groups] of another's choice."""
    scales, centres = eight_bits(scales), None if centres is None else eight_bits(centres)
    integers = nearest_integers(_groups(weight.float(), form), scales[..., None],
                                None if centres is None else centres[..., None], form)
    return stored_weights(integers.flatten(1)[:, : weight.shape[1]], scales, centres, form)


def _groups(weight: Tensor, form: WeightFormat) -> Tensor:
    """[rows, columns] -> [rows, groups, group]; the last group is filled with the last column."""
    size, groups = form.columns_of_group(weight.shape[1]), form.groups(weight.shape[1])
    filled = F.pad(weight[None], (0, groups * size - weight.shape[1]), mode="replicate")[0]
    return filled.view(-1, groups, size)


def _scales(groups: Tensor, form: WeightFormat, negative: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and centres, [rows, groups, 1]."""
    if form.asymmetric:
        scales, centres = _with_centres(groups, form)
        return eight_bits(scales), eight_bits(centres)
    if form.bits == 8:
        return eight_bits(groups.abs().amax(2, keepdim=True) / 127), None
    return eight_bits(_four_bit_scales(groups, form, negative)), None


def _four_bit_scales(groups: Tensor, form: WeightFormat, negative: bool, products: Tensor | None = None) -> Tensor:
    """[..., group] -> [..., 1]."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # with its sign
    extreme = -extreme if negative else extreme.abs()
    best, scales = torch.full_like(extreme, -math.inf), extreme / EXTREMES[-1]
    for place in EXTREMES:
        integers = nearest_integers(groups, extreme / place, None, form)
        weighted = integers if products is None else integers @ products
        product = (groups * weighted).sum(-1, keepdim=True)
        square = (integers * weighted).sum(-1, keepdim=True)
        fitted = torch.where(square > 0, product / square, 0)
        explained = product * fitted  # of the squared weights, or outputs, by the least-squares fit
        better = (explained > best) & (fitted * extreme > 0)
        best, scales = torch.where(better, explained, best), torch.where(better, fitted, scales)
    return scales


def _with_centres(groups: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    mean, steps = groups.mean(2, keepdim=True), 2**form.bits - 1
    best, scales = torch.full_like(low, -math.inf), torch.zeros_like(low)
    centres = mean.clone()
    for span in SPANS:
        scale = (high - low) * span / steps
        integers = nearest_integers(groups, scale, (low + high + scale) / 2, form)
        middle = integers.mean(2, keepdim=True)
        covariance = ((groups - mean) * (integers - middle)).sum(2, keepdim=True)
        variance = (integers - middle).square().sum(2, keepdim=True)
        fitted = torch.where(variance > 0, covariance / variance.clamp(min=1e-6), 0)
        better = covariance * fitted > best
        best = torch.where(better, covariance * fitted, best)
        scales = torch.where(better, fitted, scales)
        centres = torch.where(better, mean - fitted * middle, centres)
    return scales, centres


def nearest_integers(groups: Tensor, scales: Tensor, centres: Tensor | None, form: WeightFormat) -> Tensor:
    """The nearest ones from -middle to middle - 1, as float32; of eight bits without centre from -127.

    `scales` and `centres` have a shape that broadcasts to that of `groups`.
    """
    least = -127 if form.bits == 8 and centres is None else -form.middle
    inverse = torch.where(scales != 0, 1 / scales, 0)
    shifted = groups if centres is None else groups - centres
    return (shifted * inverse).round_().clamp_(least, form.middle - 1)


def eight_bits(numbers: Tensor) -> Tensor:
    """The nearest numbers that float16 and bfloat16 both have, as float32."""
    return numbers.half().bfloat16().float().clamp(-LARGEST, LARGEST).half().float()
