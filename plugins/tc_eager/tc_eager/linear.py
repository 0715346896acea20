"""The fastest matrix product for a layer on the CPU: PyTorch's, or core's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchchat_core import kernels
from torchchat_core.models.transformer import Transformer

SMALLEST_BYTES = 3 << 18  # of weights that oneDNN is worth its 15 microseconds of preparation for
FEW_ROWS = 4  # that core's bfloat16 kernel multiplies faster than oneDNN does


def use_fastest_linear(module: Transformer) -> None:
    """Swaps large layers on a CPU for faster ones: `OneDnnLinear` in float32, `FewRowsLinear` in bfloat16.

    The weights are shared, not copied.
    """
    layers = [(owner, name, layer) for owner in module.modules() for name, layer in owner.named_children()
              if type(layer) is nn.Linear and layer.weight.device.type == "cpu"]
    halves = sum(layer.weight.nbytes for *_, layer in layers if layer.weight.dtype == torch.bfloat16)
    with_kernels = halves > 0 and kernels.available(building=halves >= kernels.WORTH_BUILDING)
    with_one_dnn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for owner, name, layer in layers:
        if with_one_dnn and layer.weight.dtype == torch.float32 and layer.weight.nbytes >= SMALLEST_BYTES:
            setattr(owner, name, OneDnnLinear(layer))
        elif with_kernels and layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous():
            setattr(owner, name, FewRowsLinear(layer))


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


class FewRowsLinear(nn.Module):
    """x [n, in] -> [n, out] in bfloat16: core's kernel for a few rows, oneDNN for many.

    For one row oneDNN reads the weights at 14 to 19 GB/s, the kernel at what the memory gives (docs/performance.md).
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= FEW_ROWS:
            product: Tensor = torch.ops.torchchat.bfloat16_linear(x, self.weight, self.bias)
            return product
        return F.linear(x, self.weight, self.bias)
