"""Writing a model as one file: programs, kernels and weights, and with them all that core adds."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_aoti import LIBRARY, PACKAGE, __version__
from tc_aoti.compiling import INSTRUCTIONS, Compiled, compile_program
from tc_aoti.programs import Decoding, Program, programs_of
from tc_aoti.toolkit import gpu_architecture
from torchchat_core import kernels, progress
from torchchat_core.archive import Archive
from torchchat_core.artifacts import WEIGHTS, Content, Target, new_manifest, this_machine, whole_file, write_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.build import library_path
from torchchat_core.models.rotary import rotary_amplitude
from torchchat_core.quantization.layers import QuantizedEmbedding
from torchchat_core.small_files import read_file
from torchchat_core.specs import ExportRequest

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "uint8",
               torch.int8: "int8", torch.int32: "int32", torch.int64: "int64"}
PIECE = 64 << 20  # bytes of a tensor that are written at a time
KERNELS = "kernels.so"
ROOT = "archive/"  # the folder that PyTorch puts a package's entries in when it is written to memory


class AotiExporter:
    """What both forms have in common: the file itself is the first program, others are entries."""

    kind: str

    def export(self, request: ExportRequest) -> None:
        """Raises `TorchchatError` where the model cannot be compiled, or the file cannot be written."""
        programs = programs_of(request.module, request.dtype)
        compiled = [compile_program(program) for program in programs]
        tensors = {name: tensor for program in programs for name, tensor in program.weights.items()}
        target = Target(device=request.device, system=this_machine().system, machine=this_machine().machine,
                        instructions=INSTRUCTIONS if request.device == "cpu" else gpu_architecture())
        runtime = {**_runtime(request, tensors, compiled), "decoder": _decoder(programs),
                   "programs": {program.name: _places(program, made)
                                for program, made in zip(programs, compiled, strict=True)}}
        manifest = new_manifest(request, self.kind, target, versions={"tc-aoti": __version__,
                                "torch": torch.__version__}, weight_bytes=_bytes(tensors), runtime=runtime)
        size = sum(tensor.nbytes for tensor in tensors.values())
        with progress.task("writing the file", total=size, unit="B") as task, whole_file(request.path) as path:
            entry = self.write(path, compiled[0])
            operators = [Content.of(KERNELS, read_file(library_path()))] if runtime["operators"] else []
            contents = [*operators, *_code(programs, compiled), *_weights(tensors, task)]
            write_artifact(path, manifest, contents, program=entry, root="" if entry is None else ROOT)

    def write(self, path: Path, program: Compiled) -> str | None:
        """Writes the runtime's own file; the entry of the program's code where it is an archive."""
        raise NotImplementedError


class LibraryExporter(AotiExporter):
    """A shared library."""

    kind = LIBRARY

    def write(self, path: Path, program: Compiled) -> None:
        path.write_bytes(program.library.read_bytes())


class PackageExporter(AotiExporter):
    """An AOTInductor package, which PyTorch's own loader opens too."""

    kind = PACKAGE

    def write(self, path: Path, program: Compiled) -> str:
        from torch._inductor.package.package import package_aoti

        buffer = io.BytesIO()
        package_aoti(buffer, list(program.files))
        path.write_bytes(buffer.getbuffer())
        found = [name for name in Archive(path).entries if name.endswith(".so")]
        if len(found) != 1 or not found[0].startswith(ROOT):
            raise TorchchatError(f"PyTorch wrote a package with the libraries {found}")
        return found[0]


def _places(program: Program, made: Compiled) -> dict[str, Any]:
    """Where a program is, how many tokens it takes at a time, and the order of its inputs behind the cache."""
    return {"library": _library_name(program), "calls": f"programs/{program.name}.json" if made.calls else None,
            "tokens": program.tokens, "seen": program.sees, "weights": list(program.weights)}


def _library_name(program: Program) -> str:
    return "program" if program.tokens is None else f"programs/{program.name}.so"


def _code(programs: list[Program], compiled: list[Compiled]) -> Iterator[Content]:
    """Libraries that are not the file itself, and descriptions of calls, which are to lie beside libraries."""
    for program, made in zip(programs, compiled, strict=True):
        if _library_name(program) != "program":
            yield Content.of(_library_name(program), made.library.read_bytes())
        if made.calls is not None:
            yield Content.of(f"programs/{program.name}.json", made.calls.read_bytes())


def _runtime(request: ExportRequest, tensors: Mapping[str, Tensor], compiled: list[Compiled]) -> dict[str, Any]:
    config = request.module.config
    scaling = config.rope_scaling
    operators = {name: schema for made in compiled for name, schema in made.operators.items()}
    return {
        "torch": torch.__version__.split("+")[0],
        "cache": {"layers": config.num_layers, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim},
        "original_context": scaling.original_context if scaling and scaling.kind == "longrope" else None,
        "instructions": INSTRUCTIONS, "kernels": KERNELS if operators else None, "operators": operators,
        "interface": kernels.INTERFACE if operators else None,
        "tensors": {name: {"entry": WEIGHTS + name, "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
                    for name, tensor in tensors.items()},
    }


def _decoder(programs: list[Program]) -> dict[str, Any] | None:
    """What core's decoder is made of, for readers that keep one, and need not call the program for one token."""
    decoding = next((program for program in programs if isinstance(program, Decoding)), None)
    if decoding is None:
        return None
    parts, embedding, config = decoding.parts, decoding.embedding, decoding.config
    return {"tensors": decoding.order, "numbers": parts.numbers, "scalars": parts.scalars,
            "hidden_size": config.hidden_size, "embedding_multiplier": config.embedding_multiplier,
            "embedding": asdict(embedding.format) if isinstance(embedding, QuantizedEmbedding) else None,
            "rotary_interleaved": config.rope_interleaved, "rotary_amplitude": rotary_amplitude(config.rope_scaling)}


def _weights(tensors: Mapping[str, Tensor], task: progress.Task) -> Iterator[Content]:
    for name, tensor in tensors.items():
        yield Content(WEIGHTS + name, tensor.nbytes, lambda tensor=tensor: _pieces(tensor, task))  # type: ignore[misc]


def _pieces(tensor: Tensor, task: progress.Task) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, little-endian as the machines are that this writes for."""
    numbers: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    data = memoryview(numbers)
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        yield piece
        task.advance(len(piece))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of the weights, without what is computed from the configuration."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("model.rotary."))


