"""A decoder layer traced by torch.export and compiled by AOTInductor. Imported only when something is compiled."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as tracing
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tc_compile.failures import first_line
from tc_compile.graphs import LIBRARY, ONE_ROW
from tc_compile.signature import LayerSignature
from torchchat_core.errors import TorchchatError
from torchchat_core.private_cache import check_compiler_cache

EXAMPLE_ROWS, EXAMPLE_CAPACITY = 3, 256
# One thread for what is fused: it is a few microseconds of work for one token, and our operators have their threads.
OPTIONS = {"cpp.threads": 1}


class Step(nn.Module):
    """A layer as a function of everything that changes: activations, cache, place and weights."""

    def __init__(self, signature: LayerSignature) -> None:
        super().__init__()
        self.signature = signature  # which is no module: its layer's weights are inputs, not a part of this one

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, place: Tensor,
                *weights: Tensor) -> Tensor:
        """hidden [n, hidden], cos and sin [n, 1, head_dim], keys and values [kv_heads, capacity, head_dim], place [2]
        int64: positions held, and the window or 0."""
        layer, scale = self.signature.layer, self.signature.scale

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
            context: Tensor = torch.ops.torchchat.cached_attention(query, key, value, keys, values, place, scale)
            return context

        named = dict(zip(self.signature.tensors, weights, strict=True))
        output: Tensor = torch.func.functional_call(layer, named, (hidden, cos, sin, attend))
        return output


def compile_layer(signature: LayerSignature, folder: Path) -> None:
    """Writes the compiled layer to `folder`. Raises `TorchchatError` where it cannot be traced or compiled."""
    check_compiler_cache()
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _trace(signature, None)
            if not _takes_any_size(program):
                program = _trace(signature, 1)
                (folder / ONE_ROW).touch()
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "layer.pt2"),
                                                               inductor_configs=OPTIONS)
        _unpack(Path(package), folder)
    except TorchchatError:
        raise
    except Exception as error:  # the compiler raises whatever it comes upon, and eager is always there
        raise TorchchatError(f"PyTorch cannot compile the layers: {first_line(error)}") from error


def _trace(signature: LayerSignature, rows: int | None) -> ExportedProgram:
    """The layer for so many rows, or for any number of them; the cache's capacity is open in both."""
    count = EXAMPLE_ROWS if rows is None else rows
    attention, norm = signature.layer.self_attn, signature.layer.input_layernorm.weight
    cache = torch.zeros(attention.num_kv_heads, EXAMPLE_CAPACITY, attention.head_dim, dtype=norm.dtype)
    angles = torch.zeros(count, 1, attention.head_dim)
    example = (torch.zeros(count, norm.shape[0], dtype=norm.dtype), angles, angles.clone(), cache, cache.clone(),
               torch.zeros(2, dtype=torch.int64), *signature.tensors.values())
    row = {0: Dim.DYNAMIC} if rows is None else None
    shapes: dict[str, Any] = {"hidden": row, "cos": row, "sin": row, "keys": {1: Dim.DYNAMIC},
                              "values": {1: Dim.DYNAMIC}, "place": None, "weights": (None,) * len(signature.tensors)}
    with tracing.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # the same graph holds for one row
        return torch.export.export(Step(signature), example, dynamic_shapes=shapes,
                                   strict=False)


def _takes_any_size(program: ExportedProgram) -> bool:
    """Whether tracing narrowed nothing: a layer may choose between ways by the number of rows."""
    return all(found.lower <= 1 and found.upper > 1 << 31 for found in program.range_constraints.values())


def _unpack(package: Path, folder: Path) -> None:
    """Takes the library, and the description of its calls to operators, out of the package."""
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(("wrapper.so", "wrapper.json")):
                with archive.open(name) as source, (folder / LIBRARY).with_suffix(Path(name).suffix).open("wb") as to:
                    shutil.copyfileobj(source, to)
    package.unlink()
    if not (folder / LIBRARY).exists():
        raise TorchchatError("PyTorch's compiler wrote a package without a library")
