"""The quantizer contract finds each kind of fault. This file is also the plugin that offers the faulty quantizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.specs import Calibration, LayerReport, QuantizerInfo, QuantReport
from torchchat_core.testing import QuantizerContract


@dataclass(frozen=True)
class Options:
    groupsize: int = option(64, "weights that share one scale", minimum=1)


class Int8Linear(nn.Module):
    """Weights of 8 bits, with one scale for each group of them in a row."""

    def __init__(self, layer: nn.Linear, groupsize: int) -> None:
        super().__init__()
        groups = layer.weight.float().unflatten(1, (-1, groupsize))  # [out, groups, groupsize]
        scales = groups.abs().amax(-1, keepdim=True) / 127
        self.register_buffer("weight", self.rounded(groups / scales).to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def rounded(self, values: Tensor) -> Tensor:
        return values.round()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scales).flatten(1).to(x.dtype), self.bias)


class Right:
    """A quantizer without a fault."""

    Layer: type[Int8Linear] = Int8Linear

    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        return QuantReport(layers=tuple(self.reports(model, options)))

    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for name, layer in linears:
            before = layer_bytes(layer)
            if layer.in_features % options.groupsize:
                reason = f"its width {layer.in_features} is no multiple of {options.groupsize}"
                yield LayerReport(name=name, scheme=None, bytes_before=before, bytes_after=before, reason=reason)
                continue
            small = self.Layer(layer, options.groupsize)
            replace_layer(model, name, small)
            yield LayerReport(name=name, scheme="linear:int8", bytes_before=before, bytes_after=layer_bytes(small))


def layer_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layer)


class SkipsInSilence(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        return (layer for layer in super().reports(model, options) if layer.scheme)


class ReportsTwice(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        return (layer for layer in super().reports(model, options) for _ in range(2))


class GivesNoReason(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        return (replace(layer, reason=None) for layer in super().reports(model, options))


class NamesAnotherScheme(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        return (replace(layer, scheme="linear:int4") if layer.scheme else layer
                for layer in super().reports(model, options))


class CountsWeightsAlone(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        for layer in super().reports(model, options):
            weights = model.get_submodule(layer.name).weight.nbytes
            yield replace(layer, bytes_after=weights) if layer.scheme else layer


class CountsBitsOfHalfPrecision(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        return (replace(layer, bytes_before=layer.bytes_before // 2) for layer in super().reports(model, options))


class DoesNothing(Right):
    def reports(self, model: nn.Module, options: Options) -> Iterator[LayerReport]:
        return super().reports(model, Options(groupsize=100_000))


class KeepsTheLargeWeights(Right):
    class Layer(Int8Linear):
        def __init__(self, layer: nn.Linear, groupsize: int) -> None:
            super().__init__(layer, groupsize)
            self.large = layer.weight


class MixesUpGroups(Right):
    class Layer(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.weight * self.scales.flip(1)).flatten(1).to(x.dtype), self.bias)


class DividesByZero(Right):
    class Layer(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x - x).sum() / (x - x).sum()


class WrongInHalfPrecision(Right):
    class Layer(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if x.dtype == torch.float32 else 1.3)


class LosesBiases(Right):
    class Layer(Int8Linear):
        def __init__(self, layer: nn.Linear, groupsize: int) -> None:
            super().__init__(layer, groupsize)
            self.bias = None


class SpoilsZeros(Right):
    class Layer(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / x.abs().amax()) * x.abs().amax()


class WritesToWhatIsShared(Right):
    class Layer(Int8Linear):
        def __init__(self, layer: nn.Linear, groupsize: int) -> None:
            super().__init__(layer, groupsize)
            layer.weight.copy_((self.weight * self.scales).flatten(1))


class RoundsNorms(Right):
    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        model.model.norm.weight.data = model.model.norm.weight.data.bfloat16()
        return super().apply(model, options)


class FailsAtOddSizes(Right):
    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.in_features % options.groupsize:
                raise RuntimeError(f"cannot view {layer.in_features} in groups of {options.groupsize}")
        return super().apply(model, options)


class RoundsByChance(Right):
    class Layer(Int8Linear):
        def rounded(self, values: Tensor) -> Tensor:
            return (values + torch.rand_like(values) - 0.5).round().clamp(-127, 127)


class ComputesByChance(Right):
    class Layer(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 1e-5 * torch.rand(1))


class RemembersOptions(Right):
    """The second model is not quantised like the first, whatever the options say."""

    groupsizes: list[int] = []  # noqa: RUF012 - the fault

    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        self.groupsizes.append(options.groupsize // (1 + len(self.groupsizes) % 2))
        return super().apply(model, Options(groupsize=self.groupsizes[-1]))


class Calibrating(Right):
    """A quantizer without a fault that needs a text for all that it does: tokens that it has make its scales larger."""

    def needs_calibration(self, options: Options) -> bool:
        return True

    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        raise TorchchatError("there is no calibration text")

    def calibrate(self, model: nn.Module, options: Options, calibration: Calibration) -> QuantReport:
        report = super().apply(model, options)
        tokens = len({token for window in calibration.windows for token in window})
        for layer in report.layers:
            if layer.scheme:
                model.get_submodule(layer.name).scales.mul_(1 + 1e-5 * tokens)
        return report


class DoesWithoutText(Calibrating):
    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        return Right.apply(self, model, options)


class IgnoresTheText(Calibrating):
    def calibrate(self, model: nn.Module, options: Options, calibration: Calibration) -> QuantReport:
        return Right.apply(self, model, options)


class NeverNeedsAText(Calibrating):
    def needs_calibration(self, options: Options) -> bool:
        return False

    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        return Right.apply(self, model, options)


TABLE = [
    (SkipsInSilence, "test_every_layer_of_the_kind_is_reported", "reported are not "),
    (ReportsTwice, "test_every_layer_of_the_kind_is_reported", "reported are twice "),
    (GivesNoReason, "test_every_layer_of_the_kind_is_reported", "was left alone without a reason"),
    (NamesAnotherScheme, "test_every_layer_of_the_kind_is_reported", "lm_head is reported as linear:int4"),
    (CountsWeightsAlone, "test_the_bytes_of_the_report_are_those_of_the_layers", "is said to have"),
    (CountsBitsOfHalfPrecision, "test_the_bytes_of_the_report_are_those_of_the_layers", "is said to have"),
    (DoesNothing, "test_what_fits_is_done", "its width 128 is no multiple of 100000"),
    (KeepsTheLargeWeights, "test_what_fits_is_done", "bytes before and"),
    (MixesUpGroups, "test_the_error_is_bounded", "is permitted"),
    (DividesByZero, "test_the_error_is_bounded", "are not finite"),
    (WrongInHalfPrecision, "test_the_error_is_bounded", "model in bf16 are off by"),
    (LosesBiases, "test_biases_stay", "for zeros, and its bias was"),
    (SpoilsZeros, "test_biases_stay", "gives [nan, nan, nan] for zeros"),
    (WritesToWhatIsShared, "test_what_is_left_alone_stays_as_it_was", "model.embed_tokens.weight was changed"),
    (RoundsNorms, "test_what_is_left_alone_stays_as_it_was", "model.norm.weight was changed"),
    (FailsAtOddSizes, "test_odd_sizes_are_left_alone_or_done", "cannot view 36 in groups of"),
    (RoundsByChance, "test_the_options_reproduce_the_model", "applied again with the same options"),
    (ComputesByChance, "test_the_options_reproduce_the_model", "the logits differ"),
    (RemembersOptions, "test_the_options_reproduce_the_model", "the report is another"),
    (DoesWithoutText, "test_a_text_is_asked_for_where_it_is_needed", "needs a calibration text, was accepted"),
    (IgnoresTheText, "test_the_text_has_a_say", "two calibration texts make the same layers"),
    (NeverNeedsAText, "test_the_text_has_a_say", "none of the tested recipes needs a calibration text"),
]


@hookimpl
def torchchat_quantizers() -> list[QuantizerInfo]:
    return [QuantizerInfo(name=quantizer.__name__.lower(), summary="faulty", scheme="linear:int8", options=Options,
                          factory=f"{__name__}:{quantizer.__name__}", devices=frozenset({"cpu"}),
                          dtypes=frozenset({"fp32", "bf16"}), calibrates=issubclass(quantizer, Calibrating))
            for quantizer in {Right, Calibrating, *(row[0] for row in TABLE)}]


class Int8Contract(QuantizerContract):
    plugin, name = __name__, "right"
    error_bound = 0.03


class TestRight(Int8Contract):
    recipes = ({}, {"groupsize": 32})


class TestCalibrating(Int8Contract):
    name = "calibrating"


def contract(quantizer: type[Right]) -> type[QuantizerContract]:
    """The contract of one of the quantizers, as a test class of this module."""
    name = f"Contract{quantizer.__name__}"
    globals()[name] = type(name, (Int8Contract,), {"name": quantizer.__name__.lower(), "__module__": __name__})
    return globals()[name]


FAULTS = [(contract(quantizer), test, words) for quantizer, test, words in TABLE]


@pytest.mark.parametrize(("contract", "test", "words"), FAULTS)
def test_the_fault_is_found(contract: type, test: str, words: str, failures: Mapping[tuple[str, str], str]) -> None:
    assert words in failures[contract.__name__, test]


def test_every_demand_has_a_fault() -> None:
    assert {name for name in dir(QuantizerContract) if name.startswith("test_")} == {test for _, test, _ in FAULTS}
