"""The fastest matrix product that the installed PyTorch has for a layer on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchchat_core.models.transformer import Transformer

SMALLEST_BYTES = 3 << 18  # of weights that oneDNN is worth its 15 microseconds of preparation for


def use_fastest_linear(module: Transformer) -> None:
    """Swaps large float32 layers on a CPU for `OneDnnLinear`; the weights are shared, not copied."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for owner in module.modules():
        for name, layer in owner.named_children():
            if type(layer) is nn.Linear and _gains(layer.weight):
                setattr(owner, name, OneDnnLinear(layer))


def _gains(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.nbytes >= SMALLEST_BYTES


class OneDnnLinear(nn.Module):
    """x [n, in] -> [n, out] through oneDNN.

    `nn.Linear` in float32 goes to MKL, which reads weights at 12 GB/s for one row on AMD processors where oneDNN
    reads them at 18 to 28; for many rows oneDNN is no slower (docs/performance.md).
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product
