"""The quantizers: formats of weights, for core to round to."""

from __future__ import annotations

from torch import nn

from tc_quant_int8 import Int8Options
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.specs import QuantReport


class Int8:
    def apply(self, model: nn.Module, options: Int8Options) -> QuantReport:
        return quantise_layers(model, "linear:int8", WeightFormat(bits=8, group_size=options.groupsize or None))


class Int8Dynamic:
    def apply(self, model: nn.Module, _options: None) -> QuantReport:
        return quantise_layers(model, "linear:a8w8dq", WeightFormat(bits=8, activations="int8"))


class Int8Embedding:
    def apply(self, model: nn.Module, options: Int8Options) -> QuantReport:
        return quantise_layers(model, "embedding:int8", WeightFormat(bits=8, group_size=options.groupsize or None))
