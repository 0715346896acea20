"""The quantizers: formats of weights, for core to round to."""

from __future__ import annotations

from torch import nn

from tc_quant_int4 import Int4DynamicOptions, Int4EmbeddingOptions, Int4Options
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import no_whole_groups, quantise_layers
from torchchat_core.specs import QuantReport


class Int4:
    def apply(self, model: nn.Module, options: Int4Options) -> QuantReport:
        form = WeightFormat(bits=4, group_size=options.groupsize, asymmetric=options.asymmetric)
        return quantise_layers(model, "linear:int4", form)


class Int4Dynamic:
    """Positive scales and whole groups alone: XNNPACK, which runs these layers in ExecuTorch, takes nothing else."""

    def apply(self, model: nn.Module, options: Int4DynamicOptions) -> QuantReport:
        form = WeightFormat(bits=4, group_size=options.groupsize, activations="int8")
        return quantise_layers(model, "linear:a8w4dq", form, negative_scales=False,
                               refusal=lambda _rows, columns: no_whole_groups(columns, options.groupsize))


class Int4Embedding:
    def apply(self, model: nn.Module, options: Int4EmbeddingOptions) -> QuantReport:
        form = WeightFormat(bits=4, group_size=options.groupsize or None)
        return quantise_layers(model, "embedding:int4", form, negative_scales=False)
