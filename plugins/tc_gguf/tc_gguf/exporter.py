"""Writing a model as a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as ValueType
from torch import Tensor

from tc_gguf.architecture import HALF_SPLIT, architecture_of, factor_tensors, metadata_of, tensor_name
from tc_gguf.model_vocabulary import vocabulary_of_model
from tc_gguf.options import GgufOptions
from tc_gguf.vocabulary_writer import write_vocabulary
from torchchat_core import progress
from torchchat_core.artifacts import whole_file
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rope_layout import half_split_rows, interleaved_rows
from torchchat_core.specs import ExportRequest, ModelFiles

log = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2  # of the block formats, which llama.cpp asks for
BLOCK = 32  # numbers in a block of Q8_0 and of Q4_0
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # general.file_type
OF_DTYPE = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


@dataclass(frozen=True)
class Output:
    """One tensor of the file, which is not made before it is written."""

    name: str
    shape: Sequence[int]
    type: Type
    make: Callable[[], Tensor]  # of that shape, on any device

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its bytes, where the type has blocks."""
        elements, size = gguf.GGML_QUANT_SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // elements * size)


class GgufExporter:
    """A `specs.Exporter`: configuration, tokenizer, chat template and weights in one file.

    Vectors stay float32. With Q4_0 the matrix that makes the logits is Q8_0, since they suffer most; llama.cpp gives
    it more bits for the same reason. A matrix whose rows are not of whole blocks becomes F16, which is logged.
    """

    def export(self, request: ExportRequest) -> None:
        """Raises `TorchchatError` where GGUF has no words for the model or its tokenizer, or writing fails."""
        options = request.options or GgufOptions()
        kind = OF_DTYPE[request.dtype] if options.gguf_type == "auto" else options.gguf_type
        config: ModelConfig = request.module.config
        architecture = architecture_of(config)
        _warn_of_window(config)
        outputs = list(_outputs(request.module, config, architecture, kind))
        with whole_file(request.path) as partial:
            _write(_described(config, architecture, kind, request.files), outputs, partial)


def _warn_of_window(config: ModelConfig) -> None:
    """llama.cpp's graph for `llama`, the one architecture that is written with a window, does not read it."""
    if config.sliding_window is not None and config.sliding_window < config.max_context:
        log.warning("the model sees the last %d positions, and llama.cpp attends to all of them: in texts that are "
                    "longer, its answers differ from torchchat's", config.sliding_window)


# ---- what is written ----------------------------------------------------------------------------------------------


def _described(config: ModelConfig, architecture: str, kind: str, files: ModelFiles | None) -> gguf.GGUFWriter:
    """A writer that holds all of the metadata, and has no file yet."""
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(Path(files.ref.text).name.removesuffix(".gguf") if files is not None else "model")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, value in metadata_of(config, architecture).items():
        kind_of_value = {int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}[type(value)]
        writer.add_key_value(key, value, kind_of_value)
    write_vocabulary(writer, vocabulary_of_model(files, config.vocab_size) if files is not None else None)
    return writer


def _outputs(module: Any, config: ModelConfig, architecture: str, kind: str) -> Iterator[Output]:
    """The tensors in the order of the file."""
    for name, table in factor_tensors(config, architecture).items():
        yield Output(name, table.shape, Type.F32, lambda table=table: table)  # type: ignore[misc]
    smaller = []
    for canonical, weight in module.named_parameters():
        if canonical == "lm_head.weight" and config.tied_embeddings:
            continue
        name = tensor_name(canonical)
        stored = _type_of(name, weight, config, kind)
        if kind != "f32" and stored == Type.F16 != Type[kind.upper()]:
            smaller.append(name)
        yield Output(name, weight.shape, stored, _reordered(canonical, weight, config, architecture))
    if smaller:
        log.warning("%d matrices become F16 instead of %s, as their rows are no multiple of %d: %s",
                    len(smaller), kind.upper(), BLOCK, ", ".join(smaller[:3]) + (", ..." if len(smaller) > 3 else ""))


def _type_of(name: str, weight: Tensor, config: ModelConfig, kind: str) -> Type:
    if weight.dim() < 2:
        return Type.F32
    if kind in ("q4_0", "q8_0") and weight.shape[-1] % BLOCK:
        return Type.F16
    makes_logits = name == ("token_embd.weight" if config.tied_embeddings else "output.weight")
    return Type.Q8_0 if kind == "q4_0" and makes_logits else Type[kind.upper()]


def _reordered(canonical: str, weight: Tensor, config: ModelConfig, architecture: str) -> Callable[[], Tensor]:
    """Makes the tensor with the rows of queries and keys in the order of rotary pairs that the architecture has."""
    of_query, of_key = ".self_attn.q_" in canonical, ".self_attn.k_" in canonical
    if not (of_query or of_key) or config.rope_interleaved == (architecture not in HALF_SPLIT):
        return lambda: weight
    heads = config.num_heads if of_query else config.num_kv_heads
    if canonical.endswith("_norm.weight"):
        heads = 1
    reorder = half_split_rows if config.rope_interleaved else interleaved_rows
    return lambda: reorder(weight, heads)


# ---- writing ------------------------------------------------------------------------------------------------------


def _write(writer: gguf.GGUFWriter, outputs: Sequence[Output], path: Path) -> None:
    """Tensor by tensor, so that no more than one is in memory next to the module."""
    for output in outputs:
        is_block = gguf.GGML_QUANT_SIZES[output.type][0] > 1
        shape = output.stored_shape if is_block else output.shape
        writer.add_tensor_info(output.name, shape, np.dtype(np.uint8 if is_block else np.float32), _size(output),
                               raw_dtype=output.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.task("weights", total=sum(map(_size, outputs)), unit="B") as task:
            for output in outputs:
                writer.write_tensor_data(_stored(output))
                task.advance(_size(output))
    finally:
        writer.close()


def _size(output: Output) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[output.type]
    return int(np.prod(output.shape)) // elements * size


@torch.inference_mode()
def _stored(output: Output) -> np.ndarray[Any, Any]:
    """The tensor's bytes, as numpy's numbers of the type where it has one."""
    tensor = output.make().detach().cpu()
    if output.type == Type.F16:
        tensor = tensor.half()
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):  # ten times as fast as all of isfinite()
        raise TorchchatError(f"the tensor {quoted(output.name)} has values that are not finite"
                             + (" as F16" if output.type == Type.F16 else ""),
                             "export with --gguf-type bf16 or f32" if output.type == Type.F16 else
                             "the model's files are damaged; fetch it again")
    if output.type == Type.BF16:
        return tensor.bfloat16().contiguous().view(torch.int16).numpy()
    if output.type == Type.F16:
        return tensor.contiguous().numpy()
    values = tensor.float().contiguous().numpy()
    return values if output.type == Type.F32 else gguf.quantize(values, output.type)


