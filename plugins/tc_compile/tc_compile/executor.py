"""The reference executor's sessions over a transformer whose layers are compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import cast

from torch import nn

from tc_compile.cuda import compiled_decoder
from tc_compile.graphs import find_graph
from tc_compile.layers import CompiledStack
from tc_compile.signature import LayerSignature
from tc_eager.executor import EagerExecutor, EagerModel, token_decoder
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.layers import use_kernel_linear, use_kernel_norms
from torchchat_core.models.attention import CachedAttention, KernelAttention
from torchchat_core.models.transformer import DecoderLayer, Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.quantization.running import prepare
from torchchat_core.specs import LoadRequest

logger = logging.getLogger(__name__)


class CompileExecutor:
    """Implements `specs.Executor` with the abilities of tc-eager.

    On a GPU one token is a recorded graph, and a prompt runs as with tc-eager. Where layers cannot be compiled it says
    so in one line, a warning of the log, and runs them as tc-eager does.
    """

    def load(self, request: LoadRequest) -> EagerModel:
        if request.device == "cuda" and request.module.model.rotary.dynamic is not None:
            return self._operation_by_operation(request, "dynamic rope scaling changes the frequencies at each "
                                                         "token, and a recorded CUDA graph cannot")
        if request.device == "cuda":
            prepare(request.module, TORCH_DTYPES[request.dtype])
            try:
                decoder = compiled_decoder(request.module, request.device)
            except TorchchatError as error:
                return self._operation_by_operation(request, error)
            return EagerModel(request, CachedAttention, decoder)
        reason = kernels.load()
        if reason is not None:
            return self._operation_by_operation(request, reason)
        prepare(request.module, TORCH_DTYPES[request.dtype])
        use_kernel_linear(request.module)
        token_step = token_decoder(request.module)
        try:
            compile_layers(request.module)
        except TorchchatError as error:
            return self._operation_by_operation(request, error)
        use_kernel_norms(request.module.model)
        return EagerModel(request, KernelAttention, token_step)

    def _operation_by_operation(self, request: LoadRequest, reason: TorchchatError | str) -> EagerModel:
        logger.warning("not compiled, run operation by operation: %s", reason)
        return EagerExecutor().load(request)


def compile_layers(module: Transformer) -> None:
    """Puts a `CompiledStack` in the place of all layers; layers that are alike share one graph.

    Raises `TorchchatError` where one cannot be compiled; then the module is as it was.
    """
    layers = list(cast(Iterable[DecoderLayer], module.model.layers))
    signatures = [LayerSignature(layer, module.config.attention_scale) for layer in layers]
    found = {key: find_graph(signature) for key, signature in {each.key: each for each in signatures}.items()}
    module.model.layers = nn.ModuleList([CompiledStack(layers, signatures, [found[each.key] for each in signatures])])
