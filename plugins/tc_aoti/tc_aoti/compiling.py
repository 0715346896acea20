"""Programs traced by torch.export and compiled by AOTInductor, once: the result is kept, keyed by what was traced."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.fx.experimental._config as tracing
from torch.export import ExportedProgram

from tc_aoti.programs import Program
from tc_aoti.toolkit import cuda_toolkit, gpu_architecture
from torchchat_core import progress
from torchchat_core.artifacts import this_machine
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.private_cache import check_compiler_cache, code_folder, make_code_folder
from torchchat_core.unfinished import unfinished

# Code for every x86 processor with AVX2, so that a file runs on other machines too; the kernels choose when they run.
# Releases of PyTorch that cannot be told so compile for the processor that is there.
IS_X86 = this_machine().machine == "x86_64"
MARCH: dict[str, Any] = ({"cpp.march": "x86-64-v3", "cpp.simdlen": 256}
                         if IS_X86 and hasattr(torch._inductor.config.cpp, "march") else {})
INSTRUCTIONS = ("AVX2" if MARCH else torch.backends.cpu.get_cpu_capability()) if IS_X86 else None
# What calls our operators is not what takes the time, and optimising it takes most of the compiler's.
QUICK: dict[str, Any] = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.vec_isa_ok": True}
# One thread for what is fused: it is a few microseconds of work for one token, and our operators have their threads.
OPTIONS: dict[str, Any] = {"cpp.threads": 1, "aot_inductor.package": True, **MARCH, **QUICK}
GPU_OPTIONS: dict[str, Any] = {"aot_inductor.embed_kernel_binary": True}  # a program is one library, there too


@dataclass(frozen=True)
class Compiled:
    """A program as files in the cache folder."""

    library: Path
    calls: Path | None  # the description of its calls to operators that are not PyTorch's
    metadata: Path
    operators: dict[str, str]  # name -> schema, of the operators of ours that it calls

    @property
    def files(self) -> list[Any]:
        """All of them, as AOTInductor's packages hold them."""
        return [str(path) for path in (self.library, self.calls, self.metadata) if path is not None]


def compile_program(program: Program) -> Compiled:
    """Raises `TorchchatError` where the program cannot be traced for every length, or compiled."""
    check_compiler_cache()
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with progress.task(f"tracing the program {quoted(program.name)}"):
                exported = _trace(program)
            options = OPTIONS if program.device.type == "cpu" else {**OPTIONS, **GPU_OPTIONS}
            folder = code_folder("aoti", _key(exported, options, program.device))
            if not folder.exists():
                with (progress.task(f"compiling the program {quoted(program.name)}"),
                      cuda_toolkit() if program.device.type == "cuda" else contextlib.nullcontext()):
                    _compile(exported, folder, options)
    except TorchchatError:
        raise
    except Exception as error:  # the compiler raises whatever it comes upon
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TorchchatError(f"PyTorch cannot compile the model: {type(error).__name__}: {first:.200}",
                             "a C++ compiler is needed; --debug shows where it failed") from error
    return Compiled(folder / "program.so", calls if (calls := folder / "program.json").exists() else None,
                    folder / "program_metadata.json", _operators(exported))


def _trace(program: Program) -> ExportedProgram:
    with tracing.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # the same graph holds for one token
        exported = torch.export.export(program, program.example(), dynamic_shapes=program.dynamic_shapes(),
                                       strict=False)
    narrow = [found for found in exported.range_constraints.values() if found.lower > 1 or found.upper < 1 << 31]
    if narrow:
        raise TorchchatError(f"a layer of the model takes {narrow[0]} tokens at a time only, and so cannot be exported")
    return exported


def _key(exported: ExportedProgram, options: dict[str, Any], device: torch.device) -> str:
    """Of what was traced: every operation with its arguments and shapes, and what compiles it."""
    gpu = (torch.cuda.get_device_name(device), gpu_architecture()) if device.type == "cuda" else None
    digest = hashlib.sha256(repr((torch.__version__, torch.__config__.show(), sorted(options.items()),
                                  this_machine(), device.type, gpu)).encode())
    for node in exported.graph.nodes:
        digest.update(repr((node.op, str(node.target), node.args, node.kwargs, _form(node.meta.get("val")))).encode())
    for name, constant in sorted(exported.constants.items()):
        content = constant.cpu().numpy().tobytes() if isinstance(constant, torch.Tensor) else repr(constant).encode()
        digest.update(name.encode() + content)
    return digest.hexdigest()[:32]


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), [str(size) for size in value.shape], [str(size) for size in value.stride()]
    return [_form(each) for each in value] if isinstance(value, list | tuple) else type(value).__name__


def _operators(exported: ExportedProgram) -> dict[str, str]:
    called = {node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {operator._name: str(operator._schema) for operator in sorted(called, key=str)
            if operator.namespace == "torchchat"}


def _compile(exported: ExportedProgram, folder: Path, options: dict[str, Any]) -> None:
    """Compile in a folder next to `folder`, and move the complete result there."""
    try:
        make_code_folder(folder.parent)
        with unfinished(folder) as partial:
            made, work = partial / "made", partial / "work"
            made.mkdir()
            work.mkdir()
            module = exported.module(check_guards=False)
            files: Any = torch._inductor.aot_compile(module, *exported.example_inputs, options={
                **options, "aot_inductor.output_path": str(work)})
            _keep([Path(file) for file in files], made)
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    except OSError as error:
        if not folder.exists():
            raise TorchchatError(f"compiled programs cannot be kept in {folder.parent}: {error.strerror or error}",
                                 "set XDG_CACHE_HOME to a folder that can be written") from None


def _keep(files: list[Path], to: Path) -> None:
    """The library, its calls and its metadata, under names of our own; sources are not kept."""
    for file in files:
        if file.suffix == ".so":
            shutil.copyfile(file, to / "program.so")
        elif file.name.endswith("wrapper_metadata.json"):  # which PyTorch's loader looks for by the library's name
            shutil.copyfile(file, to / "program_metadata.json")
        elif file.suffix == ".json" and not file.name.endswith("_metadata.json"):
            shutil.copyfile(file, to / "program.json")
    if not (to / "program.so").exists():
        raise TorchchatError("PyTorch's compiler wrote no library")
