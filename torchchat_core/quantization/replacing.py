"""Replacing the layers of a model one by one, with a report of each: what quantizers have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchchat_core import progress
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import (
    GROUP_STEP,
    IntegerWeights,
    QuantizedEmbedding,
    QuantizedLinear,
    WeightFormat,
)
from torchchat_core.quantization.rounding import quantise
from torchchat_core.specs import LayerReport, QuantReport

KINDS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "embedding": nn.Embedding}  # by the first word of a scheme
Refusal = Callable[[int, int], str | None]  # of rows and columns: why such a matrix is left alone
Rounding = Callable[[Tensor, WeightFormat, bool], IntegerWeights]  # of a matrix; whether scales may be negative


def quantise_layers(model: nn.Module, scheme: str, form: WeightFormat, refusal: Refusal = lambda *_: None,
                    negative_scales: bool = True, rounding: Rounding = quantise, whole_groups: bool = False
                    ) -> QuantReport:
    """Replaces every layer of the scheme's kind by one with weights in `form`, unless `refusal` says why not.

    A weight that another layer shares stays unchanged in that layer. With `whole_groups`, a layer whose columns are not
    a multiple of the group size gets the largest smaller group size that divides them, and is left alone if none does.
    """
    kind = KINDS[scheme.partition(":")[0]]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
    reports = []
    size = sum(_weight(layer).nbytes for _, layer in layers)
    with torch.no_grad(), progress.task(f"quantising, {scheme}", total=size, unit="B") as task:
        for name, layer in layers:
            fitted, note = fit_groups(form, _weight(layer).shape[1], whole_groups)
            reason = reason_to_leave(layer, refusal) or (None if fitted is not None else note)
            if fitted is None or reason is not None:
                reports.append(left_alone(name, layer, str(reason)))
            else:
                weights = rounding(_weight(layer), fitted, negative_scales)
                reports.append(replace_layer(model, name, scheme, weights, note))
            task.advance(_weight(layer).nbytes)
    return QuantReport(layers=tuple(reports))


def reason_to_leave(layer: nn.Module, refusal: Refusal) -> str | None:
    """Why a linear or embedding layer cannot be quantised; None where it can."""
    weight = _weight(layer)
    return refusal(*weight.shape) or (None if _all_finite(weight) else "it has weights that are not finite")


def _all_finite(weight: Tensor) -> bool:
    """Without the copies that `Tensor.isfinite` makes, and in a twentieth of its time: both extremes show NaN."""
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def left_alone(name: str, layer: nn.Module, reason: str) -> LayerReport:
    """The report of a layer that stays as it is."""
    size = stored_bytes(layer)
    return LayerReport(name=name, scheme=None, bytes_before=size, bytes_after=size, reason=reason)


def replace_layer(model: nn.Module, name: str, scheme: str, weights: IntegerWeights, note: str | None = None
                  ) -> LayerReport:
    """Replace a linear or embedding layer by one with `weights`; a bias is kept. `note` is the reason in the report."""
    layer = model.get_submodule(name)
    smaller = QuantizedEmbedding(weights, _weight(layer).dtype) if isinstance(layer, nn.Embedding) \
        else QuantizedLinear(weights, layer.get_parameter("bias") if layer.bias is not None else None)
    model.set_submodule(name, smaller)
    return LayerReport(name=name, scheme=scheme, bytes_before=stored_bytes(layer), bytes_after=stored_bytes(smaller),
                       reason=note)


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers; those that are shared within the module count once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def token_bytes(model: Transformer) -> int:
    """Bytes of the weights that are read for one token: all but the input embedding, of which it is one row."""
    embedding, head = model.model.embed_tokens, model.lm_head
    shared = any(one is other for one in embedding.parameters() for other in head.parameters())
    return stored_bytes(model) - (0 if shared else stored_bytes(embedding))


def fit_groups(form: WeightFormat, columns: int, whole_groups: bool) -> tuple[WeightFormat | None, str | None]:
    """Return the format for rows with `columns` columns, and a note if it differs from `form`.

    With `whole_groups`, the group size is the largest one that divides `columns` and is at most that of `form`. If none
    does, the format is None and the note says why.
    """
    size = form.group_size
    if not whole_groups or size is None or columns % size == 0:
        return form, None
    smaller = math.gcd(size, columns)
    if smaller % GROUP_STEP:
        return None, f"its {columns} columns are not a multiple of the smallest group size, {GROUP_STEP}"
    return replace(form, group_size=smaller), f"groups of {smaller}: its {columns} columns are not a multiple of {size}"
