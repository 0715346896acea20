"""Kernels of our own for the CPU, as operators `torch.ops.torchchat.*`.

They are C++ (operators.cpp and the headers that it includes), compiled once for the installed PyTorch into the cache
folder: by `torchchat doctor --build-kernels`, or when they are first needed. Where that cannot be done, `load` says
why, and callers use what PyTorch has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.build import build, find_compiler, library_path

__all__ = ["GGML_FORMATS", "INTERFACE", "NOT_BUILT", "WORTH_BUILDING", "available", "engine_threads",
           "find_compiler", "load", "packed_bytes"]

# Of what exported files and their readers count on: the operators that programs call, what they compute, how weights
# are packed, `Decoder` and `Cache`. A change of any of them makes the next one.
INTERFACE = 2
SWITCH = "TORCHCHAT_CPU_KERNELS"  # "off" leaves them out
PANEL_ROWS, BLOCK_COLUMNS = 16, 32
GGML_FORMATS = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")  # that unpack_ggml knows
WORTH_BUILDING = 200 << 20  # bytes of weights for which it is worth the time to compile the kernels


NOT_BUILT = "the CPU kernels are not built yet: torchchat doctor --build-kernels"
OF_A_FILE = "this process has the CPU kernels that came with an exported file"

_lock = threading.Lock()
_outcome: list[str | None] = []  # of the first attempt that did not end with NOT_BUILT


def load(building: bool = True) -> str | None:
    """Makes the operators available; None, or why they are not available.

    Where they were not compiled before, they are now, which takes some ten seconds; not so without `building`. A
    compiled library that cannot be loaded is compiled again.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return f"{SWITCH} is off"
    with _lock:
        if _outcome:
            return _outcome[0]
        try:
            path = library_path()
            if not building and not path.exists():
                return NOT_BUILT
            _load(path)
        except (TorchchatError, OSError, RuntimeError) as error:
            _outcome.append(str(error))
        else:
            _outcome.append(None)
        return _outcome[0]


def load_from(library: Path) -> str | None:
    """Makes the operators of a compiled library available, which came with an exported file: nothing is compiled.

    Where others are loaded already, or were built here, those are kept: a process can have one library alone. None, or
    why there are none. The library may be of another torchchat, with other operators: the caller has to look whether
    those that it needs are there, and `load` does not give them to anyone else.
    """
    reason = load(building=False)
    if reason is None or reason == OF_A_FILE or reason.startswith(SWITCH):
        return None if reason == OF_A_FILE else reason
    with _lock:
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            return str(error).partition("\n")[0]
        _outcome[:] = [OF_A_FILE]
        return None


def available(building: bool = True) -> bool:
    """Whether the operators are there, as `load` has it."""
    return load(building) is None


@contextmanager
def engine_threads() -> Iterator[None]:
    """Run PyTorch's operations on the calling thread in the block; the kernels use the engine's own threads (crew.h).

    OpenMP threads wait for each other in every operation, which takes milliseconds while other programs use a core.
    Call `load` first; it has to succeed.
    """
    before = torch.ops.torchchat.keep_pytorch_serial(True)
    try:
        yield
    finally:
        torch.ops.torchchat.keep_pytorch_serial(before)


def _load(path: Path) -> None:
    if not path.exists():
        build(path)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError):  # damaged, or of a system library that is gone
        path.unlink(missing_ok=True)
        build(path)
        torch.ops.load_library(str(path))
    _register_fakes()


def _register_fakes() -> None:
    torch.library.register_fake("torchchat::pack_quantized", _fake_pack)
    torch.library.register_fake("torchchat::in_weight_memory", torch.empty_like)
    torch.library.register_fake("torchchat::unpack_quantized", _fake_unpack)
    torch.library.register_fake("torchchat::quantized_linear", _fake_linear)
    torch.library.register_fake("torchchat::quantized_linears", _fake_linears)
    torch.library.register_fake("torchchat::unpack_ggml", lambda *_: None)
    torch.library.register_fake("torchchat::take_apart_ggml", lambda *_: None)
    torch.library.register_fake("torchchat::dense_linear", _fake_dense_linear)
    torch.library.register_fake("torchchat::dense_linears", _fake_dense_linears)
    torch.library.register_fake("torchchat::rms_norm", lambda x, *_: torch.empty_like(x))
    torch.library.register_fake("torchchat::cached_attention", _fake_cached_attention)
    torch.library.register_fake("torchchat::batched_attention", lambda query, *_: query.flatten(1))
    torch.library.register_fake("torchchat::decode_token", _fake_decode_token)


def _fake_decode_token(hidden: Tensor, cosine: Tensor, sine: Tensor, tensors: list[Tensor],  # noqa: ARG001
                       numbers: list[int], scalars: list[float], keys: list[Tensor],  # noqa: ARG001
                       values: list[Tensor], place: Tensor) -> Tensor:  # noqa: ARG001
    return hidden.new_empty((1, numbers[-6]), dtype=torch.float32)  # the head's outputs


def packed_bytes(outputs: int, columns: int, bits: int, group_size: int, asymmetric: bool) -> int:
    """Bytes that a packed matrix takes."""
    blocks = -(-columns // BLOCK_COLUMNS)
    groups = -(-blocks // min(group_size // BLOCK_COLUMNS, blocks))
    panel = blocks * PANEL_ROWS * BLOCK_COLUMNS * bits // 8 + groups * PANEL_ROWS * (4 if asymmetric else 2)
    return -(-outputs // PANEL_ROWS) * panel


def _fake_pack(values: Tensor, scales: Tensor, offsets: Tensor | None, columns: int, bits: int,  # noqa: ARG001
               group_size: int) -> Tensor:
    return values.new_empty(packed_bytes(values.shape[0], columns, bits, group_size, offsets is not None))


def _fake_unpack(packed: Tensor, outputs: int, columns: int, bits: int, group_size: int,  # noqa: ARG001
                 asymmetric: bool) -> Tensor:  # noqa: ARG001
    return packed.new_empty((outputs, columns), dtype=torch.float32)


def _fake_linear(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, bits: int,  # noqa: ARG001
                 group_size: int, asymmetric: bool) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], outputs))


def _fake_linears(x: Tensor, packed: list[Tensor], bias: Tensor | None, outputs: list[int], bits: int,  # noqa: ARG001
                  group_size: int, asymmetric: bool) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], sum(outputs)))


def _fake_dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_dense_linears(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in weights)))


def _fake_cached_attention(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor,  # noqa: ARG001
                           place: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))
