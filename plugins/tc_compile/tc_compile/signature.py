"""What a compiled layer depends on: the key under which it is kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import platform
import uuid
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.kernels.build import library_path
from torchchat_core.models.transformer import DecoderLayer

PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class LayerSignature:
    """A layer's tensors in the order in which its graph takes them, and the key of the graph.

    `scale` is what query-key products are multiplied by. Two layers with one key differ in the values of their tensors
    alone. Raises `TorchchatError` for a tensor of a kind that compiled code cannot be handed.
    """

    def __init__(self, layer: DecoderLayer, scale: float) -> None:
        self.layer, self.scale = layer, scale
        self.tensors: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        for name, tensor in self.tensors.items():
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
                raise TorchchatError(f"the weight {quoted(name)} is a {type(tensor).__name__} on "
                                     f"{tensor.device.type}, which "
                                     "compiled layers do not take")
        self.key = self._key()

    def _key(self) -> str:
        digest = hashlib.sha256(repr((machine(), self.scale)).encode())
        for name, module in self.layer.named_modules():
            kind = type(module)
            digest.update(f"{name}\0{kind.__module__}.{kind.__qualname__}\0{source_digest(kind)}\0".encode())
            digest.update(repr(described(_attributes(module))).encode())
        for name, tensor in self.tensors.items():
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{tensor.stride()}\0".encode())
        return digest.hexdigest()[:32]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The values that its forward may read; a layer's index is no part of what it computes."""
    left_out = OF_EVERY_MODULE | {"index"}
    return {name: value for name, value in sorted(vars(module).items()) if name not in left_out}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Those of `_attributes` that can be compared: the settings of a layer, such as its sizes and format."""
    return {name: value for name, value in _attributes(module).items()
            if isinstance(value, PLAIN) or (dataclasses.is_dataclass(value) and not isinstance(value, type))}


def described(value: object) -> object:
    """Something whose `repr` is the same for equal values in every process, and never for what cannot be compared."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return [(described(key), described(held)) for key, held in value.items()]
    if isinstance(value, list | tuple):
        return [described(held) for held in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(described(held)) for held in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value).__qualname__, described(dataclasses.asdict(value)))
    if isinstance(value, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return str(value)  # its qualified name
    return uuid.uuid4().hex  # compiled, but not found again at the next start


def source_digest(kind: type) -> str:
    """Of the Python files beside the one that the class stands in; PyTorch's own are known by its version."""
    if kind.__module__.partition(".")[0] == "torch":
        return "torch"
    try:
        return _folder_digest(Path(inspect.getfile(kind)).parent)
    except (OSError, TypeError):  # made in an interactive session
        return uuid.uuid4().hex


@functools.cache
def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


@functools.cache
def machine() -> tuple[str, ...]:
    """What compiled code depends on besides the layer: PyTorch, the kernels, this plugin, and the processor."""
    processor = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return (torch.__version__, library_path().parent.name, _folder_digest(Path(__file__).parent), platform.system(),
            platform.machine(), torch.backends.cpu.get_cpu_capability(), processor)
