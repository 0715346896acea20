"""Writing a model as a .pte file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tc_executorch import ExecutorchOptions
from torchchat_core import progress
from torchchat_core.artifacts import Target, new_manifest, whole_file, write_artifact
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import QuantizedEmbedding, QuantizedLayer
from torchchat_core.quantization.replacing import stored_bytes
from torchchat_core.specs import ExportRequest, TextContent

if TYPE_CHECKING:
    from executorch.exir._serialize._cord import Cord

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 2048  # positions, where nobody asked: the KV cache is taken in full when a program is loaded
SCORED_BYTES = 16 << 20  # of logits in one step of the method that gives all of them


class ExecutorchExporter:
    """A `specs.Exporter`: one file with program, weights, tokenizer and chat template. It computes in float32."""

    def export(self, request: ExportRequest) -> None:
        """Raises `TorchchatError` where the model has what ExecuTorch's kernels do not, or writing fails."""
        model: Transformer = request.module
        options = request.options or ExecutorchOptions()
        context = context_length(model.config, request.max_seq_length)
        check_layers(model)
        with torch.inference_mode():
            program, memory = _program(model, context, options, request.text)
            with whole_file(request.path) as partial:
                _write(program, partial)
                manifest = new_manifest(request, "executorch", Target(device="cpu"), versions=_versions(),
                                        weight_bytes=stored_bytes(model), max_seq_length=context,
                                        runtime={"prefill_length": min(options.prefill_length, context),
                                                 "memory_bytes": memory})
                write_artifact(partial, dataclasses.replace(manifest, dtype="fp32"))


def context_length(config: ModelConfig, asked: int | None) -> int:
    """Positions of the KV cache. Raises `TorchchatError` for more than the attention's kernel sees of a window."""
    windows = [window for layer in range(config.num_layers) if (window := config.layer_window(layer)) is not None]
    most = min([config.max_context, *windows])
    if asked is not None and asked > most:
        raise TorchchatError(f"--max-seq-length is {asked}, and layers of the model see the last {most} positions; "
                             "ExecuTorch's attention has no such windows", f"use --max-seq-length {most}")
    if asked is None and most > DEFAULT_CONTEXT:
        log.info("the file holds sequences of %d tokens; the model takes %d, with --max-seq-length", DEFAULT_CONTEXT,
                 most)
    return min(most, DEFAULT_CONTEXT) if asked is None else asked


def check_layers(model: nn.Module) -> None:
    """Raises `TorchchatError` for quantised layers that neither XNNPACK nor ExecuTorch's kernels take as they are."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and (reason := _refusal(layer)) is not None:
            raise TorchchatError(f"ExecuTorch does not run the layer {quoted(name)}: {reason}",
                                 "quantise with linear:a8w4dq, linear:a8w8dq, linear:int8 without groups, "
                                 "embedding:int4 or embedding:int8")


def _refusal(layer: QuantizedLayer) -> str | None:
    form = layer.format
    if form.asymmetric:
        return "its groups have centres"
    size = form.columns_of_group(layer.columns)
    if layer.columns % size or (form.bits == 4 and layer.columns % 2):
        return f"its {layer.columns} columns are not of whole groups of {size}, or not of whole bytes"
    if isinstance(layer, QuantizedEmbedding):
        return None
    if form.bits == 8:
        return None if form.groups(layer.columns) == 1 else "XNNPACK has no groups of eight-bit weights"
    if form.activations != "int8":
        return "XNNPACK multiplies weights of four bits in groups with activations of eight bits alone"
    if not bool((layer.scales > 0).all()):
        return "XNNPACK takes positive scales alone"
    return None


def _program(model: Transformer, context: int, options: ExecutorchOptions, text: TextContent | None
             ) -> tuple[Cord, int]:
    """The file to be, and the bytes that KV cache and activations take when it runs."""
    with progress.task("loading ExecuTorch"), _silence():
        from tc_executorch.methods import Lengths, Writer
        from tc_executorch.program import Program

    program = Program()
    vocab = model.config.vocab_size
    scored = max(1, min(context, 128, SCORED_BYTES // 4 // vocab))
    lengths = Lengths(context, min(options.prefill_length, context), scored)
    with progress.task("writing the program", total=2 * (model.config.num_layers + 1)) as task:
        for name, every in (("forward", False), ("score", True)):
            Writer(program, name, model, lengths, every, advance=task.advance).write()
        program.constant_methods(metadata(model.config, lengths.context, lengths.prefill, text))
    return program.serialised(), program.methods[0].memory.size


@contextmanager
def _silence() -> Iterator[None]:
    """Without the warnings of packages that are imported along and have no part in the export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def metadata(config: ModelConfig, context: int, prefill: int, text: TextContent | None) -> dict[str, Any]:
    """What ExecuTorch's text runner asks a program, by the names of its constants.h."""
    bos = text.bos_id if text is not None else None
    ends = sorted(text.end_ids) if text is not None else []
    return {
        **({} if bos is None else {"get_bos_id": bos}),
        **({"get_eos_ids": ends} if ends else {}),
        "get_max_seq_len": prefill, "get_max_context_len": context, "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_layers, "use_kv_cache": True, "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _write(program: Cord, path: Path) -> None:
    from tc_executorch.constants import Constant

    with path.open("wb") as file, progress.task("weights", total=len(program), unit="B") as task:
        for piece in program._buffers:
            file.write(piece.content() if isinstance(piece, Constant) else piece)
            task.advance(len(piece))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("tc-executorch", "executorch", "torch")}
