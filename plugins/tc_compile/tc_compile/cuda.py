"""Decoding on a GPU: one token as a graph of kernels that is recorded once and started with a single call.

A recorded graph knows shapes and addresses, so it belongs to one size of a cache and to its memory. The cache grows by
doubling: a sequence needs a handful of graphs, and what they attend to is at most twice what is held. A sequence that
ends leaves its graphs and their memory to the next one. The kernels in them are compiled once for each kind of layer,
whatever the size of the cache, and PyTorch keeps them across starts.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tc_compile.failures import first_line
from tc_compile.signature import described, plain_attributes
from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import FIRST_CAPACITY, KVCache
from torchchat_core.models.transformer import Attend, DecoderLayer, Transformer
from torchchat_core.private_cache import check_compiler_cache

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]  # `CudaRecorder`
LayerStep = Callable[..., Tensor]  # `layer_step`, compiled
WARM_UPS = 3  # before recording: kernels are chosen and workspaces taken then
SPARE = 2  # recordings of one size that are kept for sequences to come


@dataclass(frozen=True)
class LayerAttention:
    """The `Attend` of one layer for one token, whose shapes never change: to all of the cache's memory, behind a mask.

    Written as sums of products in float32, which the compiler turns into kernels that spread over the whole GPU; those
    of `scaled_dot_product_attention` give one token's head to one multiprocessor.
    """

    position: Tensor  # [1] int64, where the token stands
    keys: Tensor  # [kv_heads, capacity, head_dim]
    values: Tensor
    scale: float
    window: int | None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG002 - an `Attend`
        self.keys.index_copy_(1, self.position, key.transpose(0, 1))
        self.values.index_copy_(1, self.position, value.transpose(0, 1))
        grouped = query.view(self.keys.shape[0], -1, 1, query.shape[2])  # [kv_heads, group, 1, head_dim]
        scores = (grouped.float() * self.keys[:, None].float()).sum(3) * self.scale  # [kv_heads, group, capacity]
        weights = scores.masked_fill(~self._visible(), float("-inf")).softmax(2)
        context = (weights[..., None] * self.values[:, None].float()).sum(2)  # [kv_heads, group, head_dim]
        return context.to(query.dtype).reshape(1, -1)

    def _visible(self) -> Tensor:
        """True for the positions that the token sees: [capacity]."""
        column = torch.arange(self.keys.shape[1], device=self.position.device)
        visible = column <= self.position
        return visible if self.window is None else visible & (column > self.position - self.window)


class StaticAttention:
    """An `Attend` of all layers, each with the memory of its cache."""

    def __init__(self, config: ModelConfig, position: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.config, self.position, self.keys, self.values = config, position, keys, values

    def of(self, layer: int) -> LayerAttention:
        return LayerAttention(self.position, self.keys[layer], self.values[layer], self.config.attention_scale,
                              self.config.layer_window(layer))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.of(layer)(layer, query, key, value)


def layer_step(layer: DecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor, attend: LayerAttention) -> Tensor:
    """hidden [1, hidden] -> [1, hidden]; key and value go into the cache."""
    return cast(Tensor, layer(hidden, cos, sin, attend))


class CompiledLayer(nn.Module):
    """A layer whose step for one token is compiled, and which runs as it is for more."""

    def __init__(self, layer: DecoderLayer, step: LayerStep) -> None:
        super().__init__()
        self.layer, self.index, self.step = layer, layer.self_attn.index, step

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if not isinstance(attend, StaticAttention):
            return cast(Tensor, self.layer(hidden, cos, sin, attend))
        own = attend.of(self.index)
        for room in (own.keys, own.values):
            torch._dynamo.mark_dynamic(room, 1)
        return self.step(self.layer, hidden, cos, sin, own)


def compile_layers_for_graphs(module: Transformer, backend: str | Callable[..., Any] = "inductor") -> None:
    """Puts a `CompiledLayer` in the place of each layer; layers that are alike share their code.

    The compiler counts how often it compiles the same function, and gives up after some; so each kind of layer of each
    model has a function of its own.
    """
    steps: dict[object, LayerStep] = {}
    compiled = []
    for layer in cast(Iterable[DecoderLayer], module.model.layers):
        kind = kind_of(layer, module.config.layer_window(layer.self_attn.index))
        if kind not in steps:
            own = types.FunctionType(layer_step.__code__.replace(), globals(), layer_step.__name__)
            steps[kind] = cast(LayerStep, torch.compile(own, fullgraph=True, dynamic=False, backend=backend))
        compiled.append(CompiledLayer(layer, steps[kind]))
    module.model.layers = nn.ModuleList(compiled)


def kind_of(layer: DecoderLayer, window: int | None) -> tuple[object, ...]:
    """Equal for layers whose code is the same: their parts have the same class, settings, shapes and dtypes."""
    return (window, *((type(part), repr(described(plain_attributes(part))), *(
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in (*part.named_parameters(recurse=False),
                                                                       *part.named_buffers(recurse=False))))
        for part in layer.modules()))


@dataclass(eq=False)
class Recording:
    """A graph, and the memory that it reads and writes."""

    key: tuple[int, int]  # capacity of the cache, and which rotary frequencies are used
    keys: list[Tensor]  # of each layer, [kv_heads, capacity, head_dim]
    values: list[Tensor]
    token: Tensor  # [1] int64
    position: Tensor  # [1] int64
    logits: Tensor  # [1, vocab] float32
    replay: Replay


class GraphDecoder:
    """What tc-eager's model calls for one token of one sequence; other steps go the ordinary way."""

    def __init__(self, module: Transformer, device: str,
                 record: Recorder | None = None) -> None:
        """`record` records CUDA graphs unless something else is given."""
        self._module, self._device = module, device
        self._record = record or CudaRecorder()
        self._used: dict[int, Recording] = {}  # by the id of the cache
        self._spare: list[Recording] = []
        self._turn = threading.Lock()  # graphs share the memory that they compute with in between

    def logits(self, token: int, cache: KVCache, extended: int) -> Tensor:
        """Of the token behind those that the cache holds: float32 [1, vocab] on the CPU.

        Raises `TorchchatError` where the cache is full; `cache.advance` is left to the caller.
        """
        with self._turn:
            recording = self._recording(cache, extended)
            recording.token.fill_(token)
            recording.position.fill_(cache.length)
            recording.replay()
            return on_cpu(recording.logits)  # a copy: the next replay writes to that memory

    def _recording(self, cache: KVCache, extended: int) -> Recording:
        """The one that the cache has; where it has grown, or has none, one that was left, or else a new one."""
        keys, values = cache.all_rooms(1)
        key = (keys[0].shape[1], extended)
        recording = self._used.get(id(cache))
        if recording is not None and recording.key == key:
            return recording
        if recording is not None:
            self.leave(id(cache))
        found = next((each for each in self._spare if each.key == key), None)
        if found is None:
            found = self._made(key, list(keys), list(values), cache.length)
        else:
            self._spare.remove(found)
            cache.move_to(found.keys, found.values)
        self._used[id(cache)] = found
        if recording is None:
            weakref.finalize(cache, _leave, weakref.ref(self), id(cache)).atexit = False
        return found

    def leave(self, cache: int) -> None:
        """Keeps what the cache of this id had for the next one, unless there are enough of them."""
        left = self._used.pop(cache, None)
        if left is None:  # a larger one could not be recorded
            return
        if sum(each.key == left.key for each in self._spare) < SPARE:
            self._spare.append(left)

    def _made(self, key: tuple[int, int], keys: list[Tensor], values: list[Tensor], length: int) -> Recording:
        """Recording runs the step for the next position, whose keys and values are written again afterwards.

        What is behind the mask counts with weight zero, so it must not be what memory happened to hold.
        """
        for each in (*keys, *values):
            each[:, length:].zero_()
        token = torch.zeros(1, dtype=torch.int64, device=self._device)
        position = torch.full_like(token, length)
        attend = StaticAttention(self._module.config, position, keys, values)

        def step() -> Tensor:
            logits: Tensor = self._module(token, position, attend, extended=key[1])
            return logits.float()

        replay, logits = self._record(step)
        return Recording(key, keys, values, token, position, logits, replay)


def compiled_decoder(module: Transformer, device: str, backend: str | Callable[..., Any] = "inductor",
                     record: Recorder | None = None) -> GraphDecoder:
    """Compiles the layers, and records a first graph, which the first sequence takes over.

    Raises `TorchchatError` where that fails; then the module is as it was.
    """
    check_compiler_cache()
    layers = module.model.layers
    compile_layers_for_graphs(module, backend)
    decoder = GraphDecoder(module, device, record)
    cache = KVCache(module.config, min(FIRST_CAPACITY, module.config.max_context), module.model.norm.weight.dtype,
                    torch.device(device))
    try:
        with torch.inference_mode(), progress.task("compiling the layers"):
            decoder.logits(0, cache, extended=0)
    except Exception as error:  # the compiler raises whatever it comes upon, and eager is always there
        module.model.layers = layers
        raise TorchchatError(f"PyTorch cannot compile the layers: {first_line(error)}") from error
    return decoder


def _leave(decoder: weakref.ref[GraphDecoder], cache: int) -> None:
    """When a cache is gone; its decoder may be, too."""
    alive = decoder()
    if alive is not None:
        alive.leave(cache)


def on_cpu(logits: Tensor) -> Tensor:
    """A copy in the CPU's memory, from a GPU through pages that it can write to itself."""
    if logits.device.type == "cpu":
        return logits.clone()
    copied = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    copied.copy_(logits, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return copied


class CudaRecorder:
    """Records steps that are replayed one at a time, so that what they compute with in between shares its memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """What starts the recorded step again, and the memory of its result."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others may load models
            logits = step()
        return graph.replay, logits
