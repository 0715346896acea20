"""GPTQ: a matrix is rounded column by column, and those that are left make up for what was lost in those before.

What is made small is the error of the layer's outputs on a text rather than that of its weights: for the inputs X
[tokens, columns], the sum over the rows r of (t - r) H (t - r)^T with H = X^T X, where t is the row before rounding.
Frantar et al. 2022, arXiv:2210.17323, with three things of others:

- The target is W + W D H^-1, with D the sum of (x' - x) x^T, where x' is what the layer would be given if nothing
  before it were rounded: the least-squares answer to inputs that are off already (as Li et al. 2025, arXiv:2504.02692).
- Afterwards the scales are fitted to the integers, by least squares under H, for all groups of a row together;
- and each integer is set to the best one beside the others, column by column (coordinate descent).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.quantization.layers import IntegerWeights, WeightFormat
from torchchat_core.quantization.rounding import eight_bits, nearest_integers, searched_scales, stored_weights

DAMPING = 0.05  # of the mean of the diagonal, added to it: fewer tokens than columns leave directions without a say
MOST_DAMPING = 10.0
REFINEMENTS = 2
FITTED_AT_ONCE = 1 << 22  # numbers in the equations of the rows whose scales are fitted at once


@dataclass(frozen=True)
class InputStatistics:
    """What a text gives a linear layer to multiply, summed over its tokens."""

    products: Tensor  # float32 [columns, columns], the sum of x x^T for inputs x behind quantised layers
    drift: Tensor  # float32 [columns, columns], the sum of (x' - x) x^T, where x' are those behind unquantised ones

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> InputStatistics:
        return cls(torch.zeros(columns, columns, device=device), torch.zeros(columns, columns, device=device))

    def add(self, inputs: Tensor, reference: Tensor) -> None:
        """Counts tokens in: inputs x and x', both [tokens, columns]."""
        inputs = inputs.float()
        self.products.addmm_(inputs.T, inputs)
        self.drift.addmm_((reference.float() - inputs).T, inputs)

    @property
    def finite(self) -> bool:
        return bool(self.products.isfinite().all() and self.drift.isfinite().all())


@torch.no_grad()
def quantise_for_inputs(weight: Tensor, statistics: InputStatistics, form: WeightFormat, negative_scales: bool = True
                        ) -> IntegerWeights:
    """The integers that stand for `weight` [rows, columns], where that is multiplied with such inputs.

    Raises `TorchchatError` where the statistics are not those of any inputs.
    """
    inverse, hessian = _inverse(statistics.products)
    target = weight.float()
    target = target + target @ (statistics.drift.double() @ inverse).float()
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    rounded = _rounded_in_turn(target, hessian, factor, form, negative_scales)
    for _ in range(REFINEMENTS):
        rounded = _with_fitted_scales(rounded, target, hessian)
        rounded = _with_better_integers(rounded, target, hessian)
    return stored_weights(rounded.integers, rounded.scales, rounded.centres, form)


@dataclass(frozen=True)
class _Rounded:
    """A matrix on the way: integers from -middle to middle - 1."""

    form: WeightFormat
    integers: Tensor  # float32 [rows, columns]
    scales: Tensor  # float32 [rows, groups]
    centres: Tensor | None  # float32 [rows, groups], of asymmetric formats

    def groups(self) -> Iterator[tuple[int, slice]]:
        yield from _groups(self.form, self.integers.shape[1])

    def group(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Scales and centres of one group, [rows, 1]."""
        here = slice(index, index + 1)
        return self.scales[:, here], None if self.centres is None else self.centres[:, here]

    def meaning(self) -> Tensor:
        """float32 [rows, columns]."""
        size, columns = self.form.columns_of_group(self.integers.shape[1]), self.integers.shape[1]
        spread = self.scales.repeat_interleave(size, 1)[:, :columns]
        meaning = self.integers * spread
        return meaning if self.centres is None else meaning + self.centres.repeat_interleave(size, 1)[:, :columns]


def _groups(form: WeightFormat, columns: int) -> Iterator[tuple[int, slice]]:
    size = form.columns_of_group(columns)
    for index in range(form.groups(columns)):
        yield index, slice(index * size, min(columns, (index + 1) * size))


def _inverse(products: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of the damped matrix in float64, and the damped matrix in float32."""
    mean = products.diagonal().mean().double().clamp(min=1e-12)
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = products.double()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.cholesky_inverse(factor), damped.float()
        damping *= 10
    raise TorchchatError("the products of a layer's inputs are no products: the text was computed wrongly",
                         "use another text, or --dtype fp32")


def _rounded_in_turn(target: Tensor, hessian: Tensor, factor: Tensor, form: WeightFormat, negative_scales: bool
                     ) -> _Rounded:
    """GPTQ's way through the columns. `factor` is the upper Cholesky factor of H^-1."""
    left = target.clone()
    integers, scales, centres = torch.empty_like(target), list[Tensor](), list[Tensor]()
    for _, columns in _groups(form, target.shape[1]):
        group = left[:, columns].clone()
        scale, centre = searched_scales(group, form, negative_scales, hessian[columns, columns])
        errors = torch.empty_like(group)
        within = factor[columns, columns]
        for column in range(group.shape[1]):
            here = slice(column, column + 1)
            values = nearest_integers(group[:, here], scale, centre, form)
            meaning = values * scale if centre is None else values * scale + centre
            errors[:, here] = (group[:, here] - meaning) / within[column, column]
            group[:, column + 1 :] -= errors[:, here] * within[column, column + 1 :]
            integers[:, columns.start + column] = values[:, 0]
        left[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        scales.append(scale)
        centres += [] if centre is None else [centre]
    return _Rounded(form, integers, torch.cat(scales, 1), torch.cat(centres, 1) if centres else None)


def _with_fitted_scales(rounded: _Rounded, target: Tensor, hessian: Tensor) -> _Rounded:
    """With the scales, and the centres, that fit the integers best. A scale keeps its sign."""
    parts = [rounded.integers] if rounded.centres is None else [rounded.integers, torch.ones_like(rounded.integers)]
    unknown = len(parts) * rounded.scales.shape[1]
    step = max(1, FITTED_AT_ONCE // unknown**2)
    solved = torch.cat([_solved([part[start : start + step] for part in parts], target[start : start + step], hessian,
                                rounded) for start in range(0, len(target), step)])
    solved = eight_bits(solved)
    scales, *centres = solved.split(rounded.scales.shape[1], 1)
    return _Rounded(rounded.form, rounded.integers,
                    torch.where(scales * rounded.scales > 0, scales, rounded.scales), *(centres or [None]))


def _solved(parts: list[Tensor], target: Tensor, hessian: Tensor, rounded: _Rounded) -> Tensor:
    """The normal equations of each row: float32 [rows, unknown], for each part the factors of its groups."""
    groups = rounded.scales.shape[1]
    left = target.new_empty((len(target), len(parts) * groups, len(parts) * groups), dtype=torch.float64)
    right = [_sums(part * (target @ hessian), rounded.form) for part in parts]
    for first, part in enumerate(parts):
        for index, columns in rounded.groups():
            products = part[:, columns] @ hessian[columns]  # [rows, columns of the matrix]
            left[:, first * groups + index] = torch.cat([_sums(products * other, rounded.form) for other in parts], 1)
    diagonal = left.diagonal(dim1=1, dim2=2)
    diagonal += 1e-9 * diagonal.mean(1, keepdim=True) + 1e-30  # groups whose integers are all 0 have no say
    solution: Tensor = torch.linalg.solve(left, torch.cat(right, 1).double())
    return solution.float()


def _sums(values: Tensor, form: WeightFormat) -> Tensor:
    """Sums over the groups: [rows, columns] -> [rows, groups]."""
    size, groups = form.columns_of_group(values.shape[1]), form.groups(values.shape[1])
    return F.pad(values, (0, size * groups - values.shape[1])).view(-1, groups, size).sum(2)


def _with_better_integers(rounded: _Rounded, target: Tensor, hessian: Tensor) -> _Rounded:
    """One round of coordinate descent: each integer becomes the best one, given all others of its row."""
    gradient = (target - rounded.meaning()) @ hessian
    integers = rounded.integers.clone()
    for index, columns in rounded.groups():
        scale, _ = rounded.group(index)
        slope, changes = gradient[:, columns].clone(), torch.empty_like(integers[:, columns])
        within = hessian[columns, columns]
        for column in range(changes.shape[1]):
            here, place = slice(column, column + 1), columns.start + column
            before = integers[:, place : place + 1]
            wished = before * scale + slope[:, here] / within[column, column]
            after = nearest_integers(wished, scale, None, rounded.form)
            changes[:, here] = (after - before) * scale
            slope -= changes[:, here] * within[column]
            integers[:, place : place + 1] = after
        gradient[:, columns.stop :] -= changes @ hessian[columns, columns.stop :]
    return _Rounded(rounded.form, integers, rounded.scales, rounded.centres)
