"""Quantising a model with a text: one decoder layer after the other, each given what the quantised ones before it make.

The text goes through the model twice side by side: as the layers were, and as they have become. Of each layer the
matrices that are given the same inputs are done together, in the order in which they are computed, so that those
behind see what became of those before. Held in memory are the hidden states of the text, twice, the statistics of one
matrix's inputs, and the weights of one decoder layer before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchchat_core import progress
from torchchat_core.models.attention import RowAttention
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.gptq import InputStatistics, quantise_for_inputs
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import Refusal, fit_groups, left_alone, reason_to_leave, replace_layer
from torchchat_core.specs import Calibration, LayerReport, QuantReport

TOKENS_AT_ONCE = 4096
HEAD = "lm_head"


def calibrate_layers(model: Transformer, scheme: str, form: WeightFormat, calibration: Calibration,
                     refusal: Refusal = lambda *_: None, negative_scales: bool = True, whole_groups: bool = False
                     ) -> QuantReport:
    """Replace every linear layer by one with weights in `form`, chosen by GPTQ.

    `refusal` returns why a layer is left alone; `whole_groups` is as for `quantise_layers`.
    """
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    fitted = {name: fit_groups(form, layer.in_features, whole_groups) for name, layer in linear.items()}
    reasons = {name: reason_to_leave(layer, refusal) or (fitted[name][1] if fitted[name][0] is None else None)
               for name, layer in linear.items()}
    reports = {name: left_alone(name, linear[name], reason) for name, reason in reasons.items() if reason}
    wanted = [name for name in linear if name not in reports]
    with torch.no_grad(), progress.task(f"calibrating, {scheme}", total=len(wanted)) as task:
        batches = list(_batches(model, calibration))
        for block in _blocks(model):
            inside = {name: linear[name] for name in wanted if name.startswith(block.prefix)}
            for names, statistics in _stages(model, block, inside, batches):
                for name in names:
                    reports[name] = _replaced(model, name, linear[name], scheme, fitted[name], statistics,
                                              negative_scales)
                    task.advance(1)
            if block.prefix != HEAD:
                _advance(model, block, inside, batches)
    return QuantReport(layers=tuple(reports[name] for name in linear))


def _replaced(model: Transformer, name: str, layer: nn.Linear, scheme: str,
              fitted: tuple[WeightFormat | None, str | None], statistics: InputStatistics, negative_scales: bool
              ) -> LayerReport:
    form, note = fitted
    if form is None or not statistics.finite:
        return left_alone(name, layer, "the text gives it inputs that are not finite")
    weights = quantise_for_inputs(layer.weight, statistics, form, negative_scales)
    return replace_layer(model, name, scheme, weights, note)


# ---- the text on its way through the model ------------------------------------------------------------------------


@dataclass
class _Batch:
    """Some windows of the text, and what they are before the next block."""

    surroundings: tuple[object, ...]  # what decoder layers are given beside hidden states
    hidden: Tensor  # [tokens, hidden], as the blocks before make them now
    reference: Tensor  # [tokens, hidden], as they made them before anything was quantised


def _batches(model: Transformer, calibration: Calibration) -> Iterator[_Batch]:
    windows = torch.tensor(calibration.windows, device=model.model.norm.weight.device)  # [windows, length]
    length = windows.shape[1]
    extended = model.model.rotary.extension(model.config.max_context, length)
    for rows in windows.split(max(1, TOKENS_AT_ONCE // length)):
        positions = torch.arange(length, device=windows.device).repeat(len(rows))
        attend = RowAttention(model.config, rows=len(rows))
        hidden, *surroundings = _arguments(model.model.layers[0], model, rows.flatten(), positions, attend, None,
                                           extended)
        yield _Batch(tuple(surroundings), hidden, hidden)


@dataclass(frozen=True)
class _Block:
    """A decoder layer, or the norm and the output layer behind the last one."""

    prefix: str  # of the names of its layers
    run: Callable[[_Batch, Tensor], Tensor]  # hidden states -> hidden states


def _blocks(model: Transformer) -> Iterator[_Block]:
    for index, layer in enumerate(model.model.layers):
        yield _Block(f"model.layers.{index}.",
                     lambda batch, hidden, layer=layer: layer(hidden, *batch.surroundings))  # type: ignore[misc]
    yield _Block(HEAD, lambda _, hidden: model.lm_head(model.model.norm(hidden)))


def _stages(model: Transformer, block: _Block, inside: Mapping[str, nn.Linear], batches: Sequence[_Batch]
            ) -> Iterator[tuple[list[str], InputStatistics]]:
    """Names of layers that are given the same inputs, and those inputs' statistics, in the order of computation."""
    for names in _order(block, inside, batches[0]):
        first = inside[names[0]]
        statistics = InputStatistics.empty(first.in_features, first.weight.device)
        for batch in batches:
            inputs, = _arguments(first, block.run, batch, batch.hidden)
            with _as_they_were(model, inside):
                reference, = _arguments(first, block.run, batch, batch.reference)
            statistics.add(inputs, reference)
        yield names, statistics


def _order(block: _Block, inside: Mapping[str, nn.Linear], batch: _Batch) -> list[list[str]]:
    """The names, in the order of computation; together those that are given the same tensor."""
    if not inside:
        return []
    order: list[list[str]] = []
    names: dict[nn.Module, str] = {layer: name for name, layer in inside.items()}
    last = None
    for layer, (given,) in _calls(inside.values(), block.run, batch, batch.hidden).items():
        if given is not last:
            order.append([])
        order[-1].append(names[layer])
        last = given
    return order


def _advance(model: Transformer, block: _Block, inside: Mapping[str, nn.Linear], batches: Sequence[_Batch]) -> None:
    for batch in batches:
        batch.hidden = block.run(batch, batch.hidden)
        with _as_they_were(model, inside):
            batch.reference = block.run(batch, batch.reference)


@contextmanager
def _as_they_were(model: Transformer, originals: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Within it, the model has its layers from before."""
    now = {name: model.get_submodule(name) for name in originals}
    _put(model, originals)
    try:
        yield
    finally:
        _put(model, now)


def _put(model: Transformer, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)


class _EnoughError(Exception):
    """Ends a computation whose rest nobody needs."""


def _arguments(module: nn.Module, run: Callable[..., object], *given: object) -> tuple[Any, ...]:
    """What `module` is called with in `run(*given)`."""
    return _calls([module], run, *given)[module]


def _calls(modules: Collection[nn.Module], run: Callable[..., object], *given: object
           ) -> dict[nn.Module, tuple[Any, ...]]:
    """What the modules are called with in `run(*given)`, in the order of the calls; the rest is not computed."""
    seen: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[module] = arguments
        if len(seen) == len(modules):
            raise _EnoughError

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        run(*given)
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen
