"""What stands in a compiled transformer in the place of its layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tc_compile.graphs import LayerGraph
from tc_compile.signature import LayerSignature
from torchchat_core.models.attention import CachedAttention
from torchchat_core.models.transformer import Attend, DecoderLayer


class CompiledStack(nn.Module):
    """All decoder layers: by their graphs for one sequence, and operation by operation for several in one step.

    Layers that are alike have the same graph, which takes its weights as inputs.
    """

    def __init__(self, layers: Sequence[DecoderLayer], signatures: Sequence[LayerSignature],
                 graphs: Sequence[LayerGraph]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.one_row = any(graph.one_row for graph in graphs)
        self.steps = [(index, graph.run, list(signature.tensors.values()))
                      for index, (signature, graph) in enumerate(zip(signatures, graphs, strict=True))]

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """hidden [n, hidden], cos and sin [n, 1, head_dim] -> [n, hidden]."""
        count = hidden.shape[0]
        if not isinstance(attend, CachedAttention) or len(attend.segments) != 1 or (self.one_row and count != 1):
            for layer in self.layers:
                hidden = layer(hidden, cos, sin, attend)
            return hidden
        cache = attend.segments[0].cache
        hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()  # compiled code takes it for granted
        for index, run, weights in self.steps:
            keys, values = cache.room(index, count)  # [kv_heads, capacity, head_dim]
            hidden = run([hidden, cos, sin, keys, values, attend.place(index, cache), *weights])
        return hidden

