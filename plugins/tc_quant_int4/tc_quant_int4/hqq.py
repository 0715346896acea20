"""Half-quadratic quantisation (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").

torchao chooses the scales, and the centres of asymmetric formats; core rounds to what they are in eight significant
bits. torchao takes seconds to import, so that this happens where the method is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.quantization.layers import IntegerWeights, WeightFormat
from torchchat_core.quantization.rounding import rounded_with

INSTALL = "pip install 'tc-quant-int4[hqq]'"


def quantise_by_hqq(weight: Tensor, form: WeightFormat, negative_scales: bool) -> IntegerWeights:
    """The integers that stand for `weight` [rows, columns], where that is float, on the same device.

    Raises `TorchchatError` where torchao is missing, or is not one that this was made for.
    """
    rows, columns = weight.shape
    size, groups = form.columns_of_group(columns), form.groups(columns)
    filled = F.pad(weight.float()[None], (0, groups * size - columns), mode="replicate")[0]  # torchao wants whole ones
    centres = None
    if form.asymmetric:
        scales, centres = _with_centres(filled, size)
    else:
        scales = _without(filled, size, negative_scales)
    return rounded_with(weight, scales.view(rows, groups), None if centres is None else centres.view(rows, groups),
                        form)


def _with_centres(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    choose = _torchao("_choose_qparams_and_quantize_affine_hqq")
    _, scales, centres, _ = choose(weight, nbits=4, group_size=size, compute_dtype=weight.dtype,
                                   device=str(weight.device))
    return scales, centres


def _without(weight: Tensor, size: int, negative: bool) -> Tensor:
    """torchao's scales are positive. Where they may be negative, the extreme of each group is to become -8."""
    groups = weight.view(-1, size)
    signs = groups.new_ones(len(groups), 1)
    if negative:
        signs = 1 - 2 * (groups.gather(1, groups.abs().argmax(1, keepdim=True)) > 0).to(groups.dtype)
    choose = _torchao("_choose_qparams_and_quantize_scale_only_hqq")
    scales: Tensor = choose(groups * signs, [1, size], -8, 7)[1]
    return scales.view(-1, 1) * signs


def _torchao(name: str) -> Callable[..., Any]:
    """One of torchao's functions, which are not of its public interface."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of parts that it has for other machines
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise TorchchatError(f'"method": "hqq" needs torchao, which cannot be imported: {error}', INSTALL) from None
    finally:
        logging.disable(before)
    found: Callable[..., Any] | None = getattr(quant_primitives, name, None)
    if found is None:
        raise TorchchatError(f'"method": "hqq" uses a function of torchao that is not of its public interface, {name}, '
                             f"and the torchao that is installed, {version('torchao')}, does not have it",
                             "pip install torchao==0.18.0, or choose another method")
    return found
