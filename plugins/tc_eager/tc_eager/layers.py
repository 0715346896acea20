"""The fastest way through a transformer's layers on the CPU: core's kernels, or else what PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchchat_core import kernels
from torchchat_core.models.transformer import Transformer

SMALLEST_BYTES = 3 << 18  # of weights that oneDNN is worth its 15 microseconds of preparation for


def use_fastest_layers(module: Transformer) -> bool:
    """Swaps layers on a CPU for faster ones; whether they are those of core's kernels.

    Where the kernels are not there, large float32 layers become `OneDnnLinear`. Weights are shared, not copied.
    """
    norm = module.model.norm.weight
    if norm.device.type != "cpu":
        return False
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if norm.dtype in (torch.float32, torch.bfloat16) and kernels.available(building=size >= kernels.WORTH_BUILDING):
        from torchchat_core.kernels.layers import use_kernel_linear, use_kernel_norms

        use_kernel_linear(module)
        use_kernel_norms(module)
        return True
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        _use_one_dnn(module)
    return False


def _use_one_dnn(module: Transformer) -> None:
    layers = [(owner, name, layer) for owner in module.modules() for name, layer in owner.named_children()
              if type(layer) is nn.Linear]
    for owner, name, layer in layers:
        if layer.weight.dtype == torch.float32 and layer.weight.nbytes >= SMALLEST_BYTES:
            setattr(owner, name, OneDnnLinear(layer))


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
