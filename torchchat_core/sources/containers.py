"""How tensors lie in a file: safetensors, torch's pickled zip (read with `weights_only`), llama2.c's .bin.

All of them are mapped: a tensor is read when it is asked for. What the tensors are called is another matter, and
that of `checkpoints`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.sources import llama2c

DAMAGED = "the file is damaged or incomplete; fetch it again"
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet: its shape, and how to get it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Container:
    """The tensors of one file by the names that it uses, and the parameters that llama2.c keeps beside them."""

    tensors: Mapping[str, StoredTensor]
    model_args: Mapping[str, Any] | None = None


class MappedFile:
    """A file of tensors that is mapped again after every `WINDOW` bytes read.

    Tensors that are used as they are keep their mapping alive, without cost. Those that are only converted let it
    go, and with it the pages that were read: otherwise a whole file would stay in memory beside its converted copy.
    """

    WINDOW = 32 << 20

    def __init__(self, path: Path, open_file: Callable[[], Callable[[str], Tensor]]) -> None:
        self._path = path
        self._open_file = open_file
        self._get = open_file()
        self._read = 0

    def read(self, name: str) -> Tensor:
        """Return the tensor. Raises `TorchchatError` if PyTorch has no such type, or cannot convert it."""
        if self._read > self.WINDOW:
            self._get = self._open_file()
            self._read = 0
        try:
            tensor = self._get(name)
            if tensor.dtype not in PLAIN and not tensor.is_complex():
                tensor[(slice(0, 1),) * tensor.dim()].to(torch.float32)
        except Exception as error:  # safetensors and PyTorch raise various errors for unsupported types
            raise TorchchatError(f"PyTorch cannot read the tensor {quoted(name)} of {self._path.name}: "
                                 f"{_first_line(error)}", "fetch the model in float32, bfloat16 or float16") from error
        self._read += tensor.numel() * tensor.element_size()
        return tensor


def read_container(path: Path, safetensors: bool) -> Container:
    """The tensors in a file of safetensors, or else of torch or llama2.c. Nothing of them is read yet.

    Raises `TorchchatError` for a file that is missing, truncated, not of its format, or that holds code.
    """
    _check_readable(path)
    if safetensors:
        return _read_safetensors(path)
    header = llama2c.read_header(path)
    return _read_torch(path) if header is None else _read_llama2c(path, header)


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise TorchchatError(f"cannot read {quoted_path(str(path))}: {error.strerror or error}") from None


def _lazy(path: Path, shapes: Mapping[str, tuple[int, ...]], open_file: Callable[[], Callable[[str], Tensor]]
          ) -> dict[str, StoredTensor]:
    file = MappedFile(path, open_file)
    return {name: StoredTensor(shape, partial(file.read, name)) for name, shape in shapes.items()}


# ---- safetensors --------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Container:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(str(path), framework="pt")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TorchchatError(f"cannot read {quoted_path(str(path))} as safetensors: {error}", DAMAGED) from None
    return Container(_lazy(path, shapes, lambda: safe_open(str(path), framework="pt").get_tensor))


# ---- llama2.c -----------------------------------------------------------------------------------------------------


def _read_llama2c(path: Path, header: llama2c.Header) -> Container:
    shapes = {name: place.shape for name, place in header.places.items()}
    return Container(_lazy(path, shapes, lambda: llama2c.mapped_tensors(path, header)), header.model_args)


# ---- torch --------------------------------------------------------------------------------------------------------


def _read_torch(path: Path) -> Container:
    found, model_args = _torch_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    return Container(_lazy(path, shapes, lambda: _torch_tensors(path)[0].__getitem__), model_args)


def _torch_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """The tensors in a torch file, and llama2.c's `model_args` where they stand beside them."""
    found = _load_torch(path)
    model_args = None
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        model_args = found.get("model_args") if isinstance(found.get("model_args"), dict) else None
        found = found["model"]
    if not isinstance(found, dict):
        raise TorchchatError(f"{path.name} holds a {type(found).__name__}; a dictionary of tensors is needed")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
            raise TorchchatError(f"tensor {quoted(name)} in {path.name} is no ordinary dense tensor",
                                 "save the model's weights as dense tensors")
    return tensors, model_args


def _load_torch(path: Path) -> Any:
    """torch.load that maps the file and unpickles tensors and plain values alone."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format of torch before 1.6
    except Exception as error:  # a damaged archive raises whatever it meets first
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise TorchchatError(
                f"{path.name} holds more than tensors: loading it would run code from the file, so it was refused",
                "ask its author for safetensors, or for a file with tensors alone") from None
        raise TorchchatError(f"cannot read {quoted_path(str(path))} as a PyTorch checkpoint: {_first_line(error)}",
                             DAMAGED) from None


def _first_line(error: Exception) -> str:
    """What torch says of a file, without its advice to load it unsafely."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return text.strip().partition("\n")[0][:200] or type(error).__name__
