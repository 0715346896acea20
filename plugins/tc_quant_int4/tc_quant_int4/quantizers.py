"""The quantizers: formats of weights, and what chooses their integers and scales."""

from __future__ import annotations

from torch import nn

from tc_quant_int4 import Int4DynamicOptions, Int4EmbeddingOptions, Int4Options
from tc_quant_int4.hqq import quantise_by_hqq
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.calibrating import calibrate_layers
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.quantization.rounding import quantise
from torchchat_core.specs import Calibration, QuantReport

LinearOptions = Int4Options | Int4DynamicOptions


class Int4:
    """Linear layers, by the nearest integers, HQQ or GPTQ."""

    scheme = "linear:int4"
    negative_scales = True
    whole_groups = False  # True if the group size has to divide the row

    def needs_calibration(self, options: LinearOptions) -> bool:
        return options.method == "gptq"

    def apply(self, model: nn.Module, options: LinearOptions) -> QuantReport:
        if self.needs_calibration(options):
            raise TorchchatError(f"{quoted(self.scheme)} with gptq needs a calibration text, and there is none",
                                 'choose the method "nearest" or "hqq", or give one to `torchchat quantize`')
        return quantise_layers(model, self.scheme, self.format(options), negative_scales=self.negative_scales,
                               rounding=quantise_by_hqq if options.method == "hqq" else quantise,
                               whole_groups=self.whole_groups)

    def calibrate(self, model: Transformer, options: LinearOptions, calibration: Calibration) -> QuantReport:
        return calibrate_layers(model, self.scheme, self.format(options), calibration,
                                negative_scales=self.negative_scales, whole_groups=self.whole_groups)

    def format(self, options: LinearOptions) -> WeightFormat:
        return WeightFormat(bits=4, group_size=options.groupsize,
                            asymmetric=isinstance(options, Int4Options) and options.asymmetric)


class Int4Dynamic(Int4):
    """Positive scales and whole groups alone: XNNPACK, which runs these layers in ExecuTorch, takes nothing else."""

    scheme = "linear:a8w4dq"
    negative_scales = False
    whole_groups = True

    def format(self, options: LinearOptions) -> WeightFormat:
        return WeightFormat(bits=4, group_size=options.groupsize, activations="int8")


class Int4Embedding:
    def apply(self, model: nn.Module, options: Int4EmbeddingOptions) -> QuantReport:
        form = WeightFormat(bits=4, group_size=options.groupsize or None)
        return quantise_layers(model, "embedding:int4", form, negative_scales=False)
