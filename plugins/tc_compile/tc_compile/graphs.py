"""Compiled layers on disk: found, or compiled and put there. Loading them imports nothing of the compiler."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from tc_compile.signature import LayerSignature
from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.private_cache import code_folder, make_code_folder
from torchchat_core.unfinished import unfinished

LIBRARY, ONE_ROW = "layer.so", "one-row"


class LayerGraph:
    """A compiled layer, which takes its weights as inputs: one for all layers that are alike."""

    def __init__(self, folder: Path) -> None:
        self.one_row = (folder / ONE_ROW).exists()  # whether it takes one token at a time and no more
        self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / LIBRARY), 1)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """inputs as `compiling.Step.forward` takes them -> hidden [n, hidden]."""
        output: Tensor = self._runner.run(inputs)[0]
        return output


def find_graph(signature: LayerSignature) -> LayerGraph:
    """The graph of such a layer, compiled now where it never was. Raises `TorchchatError` where that fails."""
    folder = graph_folder(signature.key)
    if not (folder / LIBRARY).exists():
        _make(signature, folder)
    return _load(folder)


def graph_folder(key: str) -> Path:
    """Where the graph with that key is, or would be."""
    return code_folder("compiled", key)


@functools.cache
def _load(folder: Path) -> LayerGraph:
    try:
        return LayerGraph(folder)
    except RuntimeError as error:
        raise TorchchatError(f"the compiled layer in {folder} cannot be loaded: {str(error).partition(chr(10))[0]}",
                             "delete the folder; it is compiled again") from None


def _make(signature: LayerSignature, folder: Path) -> None:
    """Compile in a folder next to `folder`, and move the complete result there."""
    from tc_compile.compiling import compile_layer

    try:
        make_code_folder(folder.parent)
        with unfinished(folder) as partial, progress.task("compiling the layers, once"):
            made = partial / "made"
            made.mkdir()
            compile_layer(signature, made)
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    except OSError as error:
        if not (folder / LIBRARY).exists():
            raise TorchchatError(f"compiled layers cannot be kept in {folder.parent}: {error.strerror or error}",
                                 "set XDG_CACHE_HOME to a folder that can be written") from None
