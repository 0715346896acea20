"""From a file to what runs: its machine compared, its kernels and programs loaded, its weights mapped."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import treespec_loads

from tc_aoti.toolkit import gpu_architecture
from torchchat_core import kernels
from torchchat_core.archive import DAMAGED
from torchchat_core.artifacts import PROGRAM, Artifact
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.kernels.decoding import DecoderParts, TokenDecoder
from torchchat_core.manifest_fields import Fields
from torchchat_core.models.rotary import RotaryEmbedding
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.quantization.layers import IntegerWeights, QuantizedEmbedding, format_from_json

DTYPES = {**TORCH_DTYPES, "uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64}
LARGEST_LIBRARY = 1 << 30  # bytes
LARGEST_SIZE = 1 << 40
LARGEST_NUMBER = 1e30
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each includes those before it, as PyTorch names them
EMBEDDING = "model.embed_tokens."


class LoadedProgram:
    """A compiled program, with the weights that it takes behind its other inputs."""

    def __init__(self, artifact: Artifact, fields: Fields, weights: Mapping[str, Tensor], folder: Path) -> None:
        self._name = artifact.path.name
        names = fields.texts("weights")
        unknown = next((name for name in names if name not in weights), None)
        if unknown is not None:
            raise TorchchatError(f"{fields.where} takes the weight {quoted(unknown)}, which the file does not have")
        self.weights = [weights[name] for name in names]
        self.sees = "seen" in fields.content and fields.boolean("seen")
        folder.mkdir()
        library = folder / "program.so"
        _put_library(artifact, fields.text("library"), library)
        calls = fields.optional_text("calls")
        if calls is not None:
            (folder / "program.json").write_bytes(artifact.read(calls, LARGEST_LIBRARY))
        try:
            self._runner = _runner(library, artifact.manifest.target.device)
        except RuntimeError as error:
            raise TorchchatError(f"the program in {artifact.path.name} cannot be loaded: "
                                 f"{str(error).partition(chr(10))[0]:.300}",
                                 f"it was compiled for PyTorch {artifact.manifest.versions.get('torch')}") from None

        self._check_inputs(artifact, fields)

    def _check_inputs(self, artifact: Artifact, fields: Fields) -> None:
        """Raise `TorchchatError` if the compiled program takes another number of inputs than it would get."""
        takes = treespec_loads(self._runner.get_call_spec()[0]).num_leaves
        several = fields.optional_number("tokens", 1, LARGEST_SIZE) is None  # then the rows are an input
        gets = 2 + self.sees + several + 2 * artifact.manifest.config.num_layers + len(self.weights)
        if takes != gets:
            raise TorchchatError(f"{fields.where} takes {takes} inputs, but the file has {len(self.weights)} weights "
                                 f"for it, which makes {gets} inputs", DAMAGED)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """inputs as docs/artifacts.md has them, without the weights -> logits float32 [rows, vocab]."""
        try:
            logits: Tensor = self._runner.run(inputs + self.weights)[0]
        except RuntimeError as error:  # any error of PyTorch or of the program
            raise TorchchatError(f"the program in {self._name} failed: {str(error).partition(chr(10))[0]:.300}",
                                 "export the model again") from error
        return logits


def _runner(library: Path, device: str) -> Any:
    if device == "cuda":
        return torch._C._aoti.AOTIModelContainerRunnerCuda(str(library), 1, "cuda")
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)


def check_machine(artifact: Artifact, runtime: Fields) -> None:
    """Raises `TorchchatError` where the processor or the GPU is another one, or PyTorch is."""
    manifest, name = artifact.manifest, artifact.path.name
    wanted = manifest.target.instructions
    if manifest.target.device == "cuda":
        here = gpu_architecture() if torch.cuda.is_available() else None
        if here != wanted:
            raise TorchchatError(f"{name} was made for a GPU of the architecture {wanted}, and "
                                 f"{'this one is ' + here if here else 'there is none here that PyTorch can use'}",
                                 "export the model on a machine like this one")
        wanted = runtime.optional_text("instructions")  # of what calls the GPU
    here = torch.backends.cpu.get_cpu_capability()
    if wanted is not None and (wanted not in CAPABILITIES or here not in CAPABILITIES
                               or CAPABILITIES.index(here) < CAPABILITIES.index(wanted)):
        raise TorchchatError(f"{name} needs a processor with {wanted}, and this one has {here}",
                             "export the model on a machine like this one")
    made, own = (_release(version) for version in (manifest.versions.get("torch", ""), torch.__version__))
    if made != own:
        raise TorchchatError(f"{name} was compiled for PyTorch {made}, and this is {own}",
                             f"pip install torch=={made}.*, or export the model again")


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load_kernels(artifact: Artifact, runtime: Fields, folder: Path) -> None:
    """Core's operators: those that were built here, or those that came with the file."""
    operators = runtime.mapping("operators")
    if not operators:
        return
    version = runtime.optional_number("interface", 1, LARGEST_SIZE)
    if version != kernels.INTERFACE:
        made = artifact.manifest.versions.get("torchchat-core", "another one")
        raise TorchchatError(f"{artifact.path.name} calls version {version or 'unknown'} of core's kernels, and those "
                             f"of this torchchat are version {kernels.INTERFACE}", "export the model again with this "
                             f"torchchat, or run the file with the one that made it: torchchat-core {made}")
    if kernels.load(building=False) is not None:
        library = folder / "kernels.so"
        library.write_bytes(artifact.read(runtime.text("kernels"), LARGEST_LIBRARY))
        reason = kernels.load_from(library)
        if reason is not None:
            raise TorchchatError(f"{artifact.path.name} calls core's CPU kernels, and they cannot be loaded: {reason}",
                                 "torchchat doctor --build-kernels")
    for name in operators:
        schema = runtime.inner("operators").text(name)
        found = _schema(name)
        if found != schema:
            raise TorchchatError(f"{artifact.path.name} calls the operator {schema:.200}, and this torchchat has "
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


def weights_of(artifact: Artifact, runtime: Fields) -> dict[str, Tensor]:
    """All weights by name. On a CPU they are mapped to the file: what is not used is not read. But packed weights, of
    which every token reads all, are copied to large pages, which are read some 10 % faster."""
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
        return torch.empty(shape, dtype=dtype, device=artifact.manifest.target.device)
    mapped = torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
    if artifact.manifest.target.device != "cpu":
        return mapped.to(artifact.manifest.target.device)
    if dtype != torch.uint8 or len(shape) != 1 or not hasattr(torch.ops.torchchat, "in_weight_memory"):
        return mapped
    copied: Tensor = torch.ops.torchchat.in_weight_memory(mapped)
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(AttributeError, OSError):  # systems without it let go of the file's pages in their time
        memory.madvise(mmap.MADV_DONTNEED, first, start + size - first)
    return copied


def decoder_of(artifact: Artifact, runtime: Fields, weights: Mapping[str, Tensor]) -> TokenDecoder | None:
    """What decodes one token in one call, made once: core's decoder, where the file says what it is made of."""
    if runtime.optional_mapping("decoder") is None:
        return None
    described, config = runtime.inner("decoder"), artifact.manifest.config
    names, scalars = described.texts("tensors"), described.scalars("scalars", LARGEST_NUMBER)
    try:
        parts = DecoderParts([weights[name] for name in names],
                             list(described.numbers("numbers", 0, LARGEST_SIZE)), list(scalars))
        return TokenDecoder(parts, _embedding(artifact, described, weights), RotaryEmbedding(config), config)
    except (KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TorchchatError(f"the decoder in {artifact.path.name} cannot be put together: {reason:.200}",
                             DAMAGED) from None


def _embedding(artifact: Artifact, described: Fields, weights: Mapping[str, Tensor]) -> nn.Module:
    manifest = artifact.manifest
    form = described.optional_mapping("embedding")
    if form is None:
        weight = weights[EMBEDDING + "weight"]
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight, _freeze=True)
    integers = IntegerWeights(format=format_from_json(form), columns=manifest.config.hidden_size,
                              values=weights[EMBEDDING + "values"], scales=weights[EMBEDDING + "scales"],
                              centres=weights.get(EMBEDDING + "centres"))
    return QuantizedEmbedding(integers, TORCH_DTYPES[manifest.dtype])
