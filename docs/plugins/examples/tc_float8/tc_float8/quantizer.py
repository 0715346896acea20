"""Weights in the float8 format E4M3 (Micikevicius et al. 2022, arXiv:2209.05433)."""

import torch
from torch import Tensor, nn

from tc_float8 import Float8Options
from torchchat_core.specs import LayerReport, QuantReport

FORMAT = torch.float8_e4m3fn


class Float8Linear(nn.Module):
    """x [n, in] -> [n, out]; `weight` is [out, in] in float8, `scale` is [out, 1]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / torch.finfo(FORMAT).max
        self.register_buffer("weight", (layer.weight / scale).to(FORMAT))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Float8Quantizer:
    def apply(self, model: nn.Module, options: Float8Options) -> QuantReport:
        linear = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        return QuantReport(layers=tuple(self._replace(model, name, layer, options) for name, layer in linear))

    def _replace(self, model: nn.Module, name: str, layer: nn.Linear, options: Float8Options) -> LayerReport:
        before = sum(tensor.nbytes for tensor in layer.parameters())
        if name == "lm_head" and not options.output_layer:
            return LayerReport(name=name, scheme=None, reason="the output layer is left as it is",
                               bytes_before=before, bytes_after=before)
        smaller = Float8Linear(layer)
        model.set_submodule(name, smaller)
        after = sum(tensor.nbytes for tensor in (*smaller.parameters(), *smaller.buffers()))
        return LayerReport(name=name, scheme="linear:float8", bytes_before=before, bytes_after=after)
