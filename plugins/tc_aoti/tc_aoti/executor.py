"""Running a file: its programs loaded, its weights mapped, and sessions that bring their own cache."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchchat_core import kernels
from torchchat_core.artifacts import PROGRAM, Artifact, open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.manifest_fields import Fields
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.sequence_limits import check_append, check_tokens, session_limit
from torchchat_core.specs import LoadRequest

DTYPES = {**TORCH_DTYPES, "uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64}
LARGEST_LIBRARY = 1 << 30  # bytes
LARGEST_SIZE = 1 << 40
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each includes those before it, as PyTorch names them


class AotiExecutor:
    """Implements `specs.Executor` with the ability `score`."""

    def load(self, request: LoadRequest) -> AotiModel:
        """Raises `TorchchatError` where the file is damaged, or not for this machine or this PyTorch."""
        if request.artifact is None:
            raise TorchchatError("the executor 'aoti' runs exported files, and was given a model in memory",
                                 "choose another executor, or export the model first")
        artifact = open_artifact(request.artifact)
        artifact.check_target()
        _check_machine(artifact)
        runtime = Fields(artifact.manifest.runtime, f"the runtime of {artifact.path.name}")
        with tempfile.TemporaryDirectory(prefix="torchchat-") as folder:  # libraries are loaded by path
            _load_kernels(artifact, runtime, Path(folder))
            weights = _mapped(artifact, runtime)
            described = runtime.inner("programs")
            programs = {name: LoadedProgram(artifact, described.inner(name), weights, Path(folder) / name)
                        for name in ("any", "decode") if name in described.content}
        if "any" not in programs:
            raise TorchchatError(f"{artifact.path.name} has no program for several tokens", "export it again")
        return AotiModel(artifact, programs["any"], programs.get("decode"),
                         runtime.optional_number("original_context", 1, LARGEST_SIZE))


class LoadedProgram:
    """A compiled program, with the weights that it takes behind its other inputs."""

    def __init__(self, artifact: Artifact, fields: Fields, weights: Mapping[str, Tensor], folder: Path) -> None:
        names = fields.texts("weights")
        unknown = next((name for name in names if name not in weights), None)
        if unknown is not None:
            raise TorchchatError(f"{fields.where} takes the weight {unknown!r:.100}, which the file does not have")
        self.weights = [weights[name] for name in names]
        folder.mkdir()
        library = folder / "program.so"
        _put_library(artifact, fields.text("library"), library)
        calls = fields.optional_text("calls")
        if calls is not None:
            (folder / "program.json").write_bytes(artifact.read(calls, LARGEST_LIBRARY))
        try:
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
        except RuntimeError as error:
            raise TorchchatError(f"the program in {artifact.path.name} cannot be loaded: "
                                 f"{str(error).partition(chr(10))[0]:.300}",
                                 f"it was compiled for PyTorch {artifact.manifest.versions.get('torch')}") from None

    def run(self, inputs: list[Tensor]) -> Tensor:
        """inputs as docs/artifacts.md has them, without the weights -> logits float32 [rows, vocab]."""
        logits: Tensor = self._runner.run(inputs + self.weights)[0]
        return logits


class AotiModel:
    """Implements `specs.LoadedModel`."""

    def __init__(self, artifact: Artifact, layers: LoadedProgram, decoding: LoadedProgram | None,
                 original_context: int | None) -> None:
        manifest = artifact.manifest
        self.config: ModelConfig = manifest.config
        self.vocab_size = manifest.config.vocab_size
        self.max_context = manifest.max_seq_length
        self.device, self.dtype = manifest.target.device, manifest.dtype
        self._original_context = original_context
        self._programs: tuple[LoadedProgram, LoadedProgram | None] | None = (layers, decoding)

    def session(self, limit: int | None = None) -> AotiSession:
        limit = session_limit(limit, self.max_context, "the file", "set --max-seq-length within that")
        extended = self._original_context is not None and limit > self._original_context
        return AotiSession(self, limit, extended)

    def run(self, tokens: Sequence[int], rows: Sequence[int], cache: KVCache, extended: bool) -> Tensor:
        """Logits float32 [rows, vocab] of the tokens that stand behind those that the cache holds."""
        if self._programs is None:
            raise TorchchatError("the model was closed")
        check_tokens(tokens, self.vocab_size)
        layers, decoding = self._programs
        keys, values = cache.all_rooms(len(tokens))
        start = [torch.tensor(tokens), torch.tensor([cache.length, extended])]
        if len(tokens) == 1 and decoding is not None:
            return decoding.run([*start, *keys, *values])
        return layers.run([*start, torch.tensor(rows), *keys, *values])

    def close(self) -> None:
        self._programs = None


class AotiSession:
    """Implements `specs.ScoringSession`. The cache is the session's own: one loaded file serves many."""

    def __init__(self, model: AotiModel, limit: int, extended: bool) -> None:
        self.limit = limit
        self._model, self._extended, self._closed = model, extended, False
        self._cache = KVCache(model.config, limit, TORCH_DTYPES[model.dtype], torch.device("cpu"))

    @property
    def length(self) -> int:
        return self._cache.length

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, [len(tokens) - 1])[0]

    def decode(self, token: int) -> Tensor:
        return self._append([token], [0])[0]

    def score(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, range(len(tokens)))

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def close(self) -> None:
        self._closed = True
        self._cache.release()

    @torch.inference_mode()
    def _append(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        check_append(len(tokens), self.length, self.limit, self._closed,
                     "allow more with --max-seq-length where the file can")
        logits = self._model.run(tokens, rows, self._cache, self._extended)
        self._cache.advance(len(tokens))
        return logits


# ---- loading ------------------------------------------------------------------------------------------------------


def _check_machine(artifact: Artifact) -> None:
    """Raises `TorchchatError` where the processor lacks instructions, or PyTorch is another one."""
    manifest = artifact.manifest
    wanted, here = manifest.target.instructions, torch.backends.cpu.get_cpu_capability()
    if wanted is not None and (wanted not in CAPABILITIES or here not in CAPABILITIES
                               or CAPABILITIES.index(here) < CAPABILITIES.index(wanted)):
        raise TorchchatError(f"{artifact.path.name} needs a processor with {wanted}, and this one has {here}",
                             "export the model on a machine like this one")
    made, own = (_release(version) for version in (manifest.versions.get("torch", ""), torch.__version__))
    if made != own:
        raise TorchchatError(f"{artifact.path.name} was compiled for PyTorch {made}, and this is {own}",
                             f"pip install torch=={made}.*, or export the model again")


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load_kernels(artifact: Artifact, runtime: Fields, folder: Path) -> None:
    """Core's operators: those that were built here, or those that came with the file."""
    operators = runtime.mapping("operators")
    if not operators:
        return
    if kernels.load(building=False) is not None:
        library = folder / "kernels.so"
        library.write_bytes(artifact.read(runtime.text("kernels"), LARGEST_LIBRARY))
        reason = kernels.load_from(library)
        if reason is not None:
            raise TorchchatError(f"{artifact.path.name} calls core's CPU kernels, and they cannot be loaded: {reason}",
                                 "python -m torchchat_core.kernels builds them, with a C++ compiler")
    for name, schema in operators.items():
        found = _schema(name)
        if found != schema:
            raise TorchchatError(f"{artifact.path.name} calls the operator {schema}, and this torchchat has "
                                 f"{found or 'none of that name'}", "export the model again, with this torchchat")


def _schema(name: str) -> str | None:
    try:
        return str(torch._C._get_schema(name, ""))
    except RuntimeError:
        return None


def _put_library(artifact: Artifact, name: str, path: Path) -> None:
    """A library of the file under a name of its own: a link to the file where it is its beginning."""
    start, size = artifact.place(name)
    if name == PROGRAM and start == 0:
        path.symlink_to(artifact.path.absolute())
    elif name == PROGRAM:
        with artifact.path.open("rb") as file:
            file.seek(start)
            path.write_bytes(file.read(size))
    else:
        path.write_bytes(artifact.read(name, LARGEST_LIBRARY))


def _mapped(artifact: Artifact, runtime: Fields) -> dict[str, Tensor]:
    """All weights by name, mapped to the file: what is not used is not read.

    Packed weights, of which every token reads all, are copied to large pages, which are read some 10 % faster.
    """
    with artifact.path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: no one writes to the file
    return {name: _tensor(artifact, memory, runtime.inner("tensors").inner(name))
            for name in runtime.mapping("tensors")}


def _tensor(artifact: Artifact, memory: mmap.mmap, fields: Fields) -> Tensor:
    dtype, shape = DTYPES[fields.one_of("dtype", DTYPES)], fields.numbers("shape", 0, LARGEST_SIZE)
    start, size = artifact.place(fields.text("entry"))
    count = 1
    for length in shape:
        count *= length
    if count * dtype.itemsize != size or start % dtype.itemsize:
        raise TorchchatError(f"{fields.where} has {size} bytes, which are not {list(shape)} of {fields.text('dtype')}",
                             "the file is damaged: copy or export it again")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    mapped = torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
    if dtype != torch.uint8 or len(shape) != 1 or not hasattr(torch.ops.torchchat, "in_weight_memory"):
        return mapped
    copied: Tensor = torch.ops.torchchat.in_weight_memory(mapped)
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(AttributeError, OSError):  # systems without it let go of the file's pages in their time
        memory.madvise(mmap.MADV_DONTNEED, first, start + size - first)
    return copied
