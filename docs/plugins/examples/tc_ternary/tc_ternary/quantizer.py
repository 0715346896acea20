"""Ternary weights in the manner of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), but after training."""

import torch
from torch import Tensor, nn

from tc_ternary import TernaryOptions
from torchchat_core.specs import LayerReport, QuantReport


class TernaryLinear(nn.Module):
    """x [n, in] -> [n, out]; `signs` [out, in] are -1, 0 or 1, `scale` is [out, 1]."""

    def __init__(self, layer: nn.Linear, threshold: float) -> None:
        super().__init__()
        size = layer.weight.abs()
        kept = size > threshold * size.mean(1, keepdim=True)
        self.register_buffer("signs", (layer.weight.sign() * kept).to(torch.int8))
        self.register_buffer("scale", (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.signs.to(x.dtype) * self.scale, self.bias)


class TernaryQuantizer:
    def apply(self, model: nn.Module, options: TernaryOptions) -> QuantReport:
        linear = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        return QuantReport(layers=tuple(self._replace(model, name, layer, options) for name, layer in linear))

    def _replace(self, model: nn.Module, name: str, layer: nn.Linear, options: TernaryOptions) -> LayerReport:
        before = sum(tensor.nbytes for tensor in layer.parameters())
        if name == "lm_head":
            return LayerReport(name=name, scheme=None, reason="the output layer would suffer most",
                               bytes_before=before, bytes_after=before)
        smaller = TernaryLinear(layer, options.threshold)
        model.set_submodule(name, smaller)
        after = sum(tensor.nbytes for tensor in (*smaller.parameters(), *smaller.buffers()))
        return LayerReport(name=name, scheme="linear:ternary", bytes_before=before, bytes_after=after)
