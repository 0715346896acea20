"""The layers that stand in a compiled transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tc_compile.graphs import LayerGraph
from tc_compile.signature import LayerSignature
from torchchat_core.models.attention import CachedAttention
from torchchat_core.models.transformer import Attend, DecoderLayer, Transformer


def use_dense_linear(module: Transformer) -> None:
    """Puts a `DenseLinear` in the place of every unquantised layer. The weights are shared, not copied."""
    layers = [(owner, name, layer) for owner in module.modules() for name, layer in owner.named_children()
              if type(layer) is nn.Linear]
    for owner, name, layer in layers:
        setattr(owner, name, DenseLinear(layer))


class DenseLinear(nn.Module):
    """x [n, in] -> [n, out]: core's kernels for a few rows, PyTorch's for many, in one operator for the graph."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.torchchat.dense_linear(x, self.weight, self.bias)
        return product


class CompiledLayer(nn.Module):
    """A decoder layer that runs its graph for one sequence, and operation by operation for several in one step."""

    def __init__(self, layer: DecoderLayer, signature: LayerSignature, graph: LayerGraph) -> None:
        super().__init__()
        self.layer = layer
        self.index = layer.self_attn.index
        self.weights = list(signature.tensors.values())
        self.graph = graph

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """hidden [n, hidden], cos and sin [n, 1, head_dim] -> [n, hidden]."""
        count = hidden.shape[0]
        if not isinstance(attend, CachedAttention) or len(attend.segments) != 1 or (self.graph.one_row and count != 1):
            output: Tensor = self.layer(hidden, cos, sin, attend)
            return output
        keys, values = attend.segments[0].cache.room(self.index, count)  # [kv_heads, capacity, head_dim]
        return self.graph.run([hidden, cos, sin, keys, values, attend.place(self.index), *self.weights])
