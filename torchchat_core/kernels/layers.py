"""Layers of a transformer that run core's CPU kernels: what executors put in the place of PyTorch's.

Weights are shared with the layers that they replace, not copied. `kernels.load` has to have succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from torchchat_core.models.transformer import Attention, FeedForward, RMSNorm, Transformer


def use_kernel_linear(module: Transformer) -> None:
    """Puts a `DenseLinear` in the place of every unquantised layer, and multiplies together what can be."""
    for owner, name, layer in _children(module, nn.Linear):
        setattr(owner, name, DenseLinear(cast(nn.Linear, layer)))
    join_projections(module)


def use_kernel_norms(module: nn.Module) -> None:
    """Puts a `KernelNorm` in the place of every norm below `module`."""
    for owner, name, norm in _children(module, RMSNorm):
        setattr(owner, name, KernelNorm(cast(RMSNorm, norm)))


def _children(module: nn.Module, kind: type) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(owner, name, child) for owner in module.modules() for name, child in owner.named_children()
            if type(child) is kind]


@runtime_checkable
class Joinable(Protocol):
    """A linear layer whose product can be made together with those of others that have the same input."""

    def joined(self, layers: Sequence[nn.Module]) -> nn.Module | None:
        """A module x [n, in] -> the outputs of `layers`, of which this is the first; None where they do not fit."""


def join_projections(module: nn.Module) -> None:
    """Has queries, keys and values multiplied together in each layer, and the two matrices at a feed-forward's input.

    The threads then meet once instead of three times, and activations are rounded once.
    """
    for block in list(module.modules()):
        if isinstance(block, Attention):
            block.qkv = _joined((block.q_proj, block.k_proj, block.v_proj))
        elif isinstance(block, FeedForward):
            block.gate_up = _joined((block.gate_proj, block.up_proj))


def _joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    return layers[0].joined(layers) if isinstance(layers[0], Joinable) else None


def joined_bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    """One bias for outputs that stand side by side. All layers have one, or none has."""
    found = [bias.detach() for bias in biases if bias is not None]
    return torch.cat(found) if found else None


class DenseLinear(nn.Module):
    """x [n, in] -> [n, out] in float32 or bfloat16: core's kernels for a few rows, PyTorch's for many."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.torchchat.dense_linear(x, self.weight, self.bias)
        return product

    def joined(self, layers: Sequence[nn.Module]) -> nn.Module | None:
        alike = [layer for layer in layers if isinstance(layer, DenseLinear)
                 and layer.weight.dtype == self.weight.dtype and (layer.bias is None) == (self.bias is None)]
        return DenseLinears(alike) if len(alike) == len(layers) else None


class DenseLinears(nn.Module):
    """x [n, in] -> the outputs of several `DenseLinear`."""

    bias: Tensor | None

    def __init__(self, layers: Sequence[DenseLinear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        for index, layer in enumerate(layers):
            self.register_parameter(f"weight{index}", layer.get_parameter("weight"))
        self.register_buffer("bias", joined_bias([layer.bias for layer in layers]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights = [getattr(self, f"weight{index}") for index in range(len(self.sizes))]
        products: tuple[Tensor, ...] = torch.ops.torchchat.dense_linears(x, weights, self.bias).split(self.sizes, 1)
        return products


class KernelNorm(nn.Module):
    """`RMSNorm` in one operation: x [..., size] -> the same."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = torch.ops.torchchat.rms_norm(x, self.weight, self.eps)
        return normed
