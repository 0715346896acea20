"""The reference executor's sessions over a transformer whose layers are compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import cast

from tc_compile.graphs import LayerGraph, find_graph
from tc_compile.layers import CompiledLayer, use_dense_linear
from tc_compile.signature import LayerSignature
from tc_eager.executor import EagerExecutor, EagerModel
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import DecoderLayer, Transformer
from torchchat_core.specs import LoadRequest

logger = logging.getLogger(__name__)


class CompileExecutor:
    """Implements `specs.Executor` with abilities `score` and `batch`.

    Where layers cannot be compiled it says so in one line, a warning of the log, and runs them as tc-eager does.
    """

    def load(self, request: LoadRequest) -> EagerModel:
        reason = kernels.load()
        if reason is not None:
            logger.warning("not compiled, run operation by operation: %s", reason)
            return EagerExecutor().load(request)
        use_dense_linear(request.module)
        try:
            compile_layers(request.module)
        except TorchchatError as error:
            logger.warning("not compiled, run operation by operation: %s", error)
            return EagerExecutor().load(request)
        return EagerModel(request.module, request.device, request.dtype)


def compile_layers(module: Transformer) -> None:
    """Puts a `CompiledLayer` in every layer's place; layers that are alike share one graph.

    Raises `TorchchatError` where one cannot be compiled; then the module is as it was.
    """
    graphs: dict[str, LayerGraph] = {}
    compiled = []
    for layer in cast(Iterable[DecoderLayer], module.model.layers):
        signature = LayerSignature(layer, module.config.attention_scale)
        if signature.key not in graphs:
            graphs[signature.key] = find_graph(signature)
        compiled.append(CompiledLayer(layer, signature, graphs[signature.key]))
    for index, replacement in enumerate(compiled):
        module.model.layers[index] = replacement
