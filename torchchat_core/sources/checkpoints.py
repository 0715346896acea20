"""Reading checkpoints: any of the containers, any of the naming schemes, one `Checkpoint` behind them.

A container is how tensors lie in a file (safetensors, or torch's pickled zip, read with `weights_only`). A naming
scheme is what they are called (Hugging Face's or Meta's). The two are independent.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig, config_from_hugging_face, config_from_meta
from torchchat_core.small_files import read_json
from torchchat_core.specs import ModelFiles

DAMAGED = "the file is damaged or incomplete; fetch it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet: its shape, and how to get it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class StoredCheckpoint:
    """Implements `specs.Checkpoint` over stored tensors by canonical name."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
        self.config = config
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, which stands for all of the matrices."""
        if "model.embed_tokens.weight" not in self._tensors:
            raise TorchchatError("the checkpoint has no tensor 'model.embed_tokens.weight'",
                                 "it is incomplete; fetch it again")
        return self._tensors["model.embed_tokens.weight"].read().dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._tensors[name].read()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Container:
    """The tensors of one file by the names that it uses, and the parameters that llama2.c keeps beside them."""

    tensors: Mapping[str, StoredTensor]
    model_args: Mapping[str, Any] | None = None


def open_checkpoint(files: ModelFiles) -> StoredCheckpoint:
    """The checkpoint in `files`, of format "safetensors" or "pytorch". Weights are mapped, not read.

    Raises `TorchchatError` for a file that is missing, truncated, not of its format, or that holds code.
    """
    read = _read_safetensors if files.format == "safetensors" else _read_torch
    containers = [read(path) for path in _shards(files.weights)]
    model_args = containers[0].model_args
    shards = [_weights(container.tensors) for container in containers]
    if any("tok_embeddings.weight" in shard for shard in shards):
        merged = {_meta_name(name): stored for name, stored in _merge_parallel(shards).items()}
        shapes = {name: stored.shape for name, stored in merged.items()}
        return StoredCheckpoint(config_from_meta(model_args or _params(files), shapes), merged)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        named = {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": stored
                 for name, stored in shard.items()}
        twice = sorted(tensors.keys() & named.keys())
        if twice:
            listed = ", ".join(path.name for path in files.weights)
            raise TorchchatError(f"{twice[0]!r} is in two of the files {listed}",
                                 "they belong to different models; name the one file that is meant")
        tensors |= named
    if not tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        raise TorchchatError(f"{files.weights[0].name} holds no language model that torchchat knows: its tensors are "
                             f"called {', '.join(sorted(tensors)[:3]) or 'nothing at all'}")
    if files.config is None or files.config.name == "params.json":
        raise TorchchatError(f"there is no config.json beside {files.weights[0].name}",
                             "put the model's config.json there, or name it with --params-path")
    config = config_from_hugging_face(read_json(files.config))
    if config.tied_embeddings and "lm_head.weight" in tensors:  # some files keep the one under the other's name
        tensors.setdefault("model.embed_tokens.weight", tensors["lm_head.weight"])
    return StoredCheckpoint(config, tensors)


def _params(files: ModelFiles) -> Mapping[str, Any]:
    beside = files.root / "params.json"
    if files.config is not None and files.config.name == "config.json" and beside.is_file():
        return read_json(beside)  # folders of hubs keep both, and Meta's names go with Meta's file
    if files.config is None:
        raise TorchchatError(f"there is no params.json beside {files.weights[0].name}",
                             "name the file that states the model's sizes with --params-path")
    return read_json(files.config)


def _shards(weights: tuple[Path, ...]) -> list[Path]:
    """The weight files; an index is replaced by the files that it names, which have to lie beside it."""
    if len(weights) != 1 or not weights[0].name.endswith(".index.json"):
        return list(weights)
    index = weights[0]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise TorchchatError(f"{index.name} has no weight_map", DAMAGED)
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or len(name) > 255:
            raise TorchchatError(f"{index.name} points to {name!r:.100}, outside its own folder")
        if not (index.parent / name).is_file():
            raise TorchchatError(f"{index.name} names {name!r}, which is not in {str(index.parent)!r}", DAMAGED)
    return [index.parent / name for name in names]


# ---- containers ---------------------------------------------------------------------------------------------------


class MappedFile:
    """A file of tensors that is mapped again after every `WINDOW` bytes read.

    Tensors that are used as they are keep their mapping alive, without cost. Those that are only converted let it
    go, and with it the pages that were read: otherwise a whole file would stay in memory beside its converted copy.
    """

    WINDOW = 32 << 20

    def __init__(self, open_file: Callable[[], Callable[[str], Tensor]]) -> None:
        self._open_file = open_file
        self._get = open_file()
        self._read = 0

    def read(self, name: str) -> Tensor:
        if self._read > self.WINDOW:
            self._get = self._open_file()
            self._read = 0
        tensor = self._get(name)
        self._read += tensor.numel() * tensor.element_size()
        return tensor


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise TorchchatError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def _read_safetensors(path: Path) -> Container:
    from safetensors import SafetensorError, safe_open

    _check_readable(path)
    try:
        opened = safe_open(str(path), framework="pt")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TorchchatError(f"cannot read {str(path)!r} as safetensors: {error}", DAMAGED) from None
    file = MappedFile(lambda: safe_open(str(path), framework="pt").get_tensor)
    return Container({name: StoredTensor(shape, partial(file.read, name)) for name, shape in shapes.items()})


def _read_torch(path: Path) -> Container:
    found, model_args = _torch_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    file = MappedFile(lambda: _torch_tensors(path)[0].__getitem__)
    return Container({name: StoredTensor(shape, partial(file.read, name)) for name, shape in shapes.items()},
                     model_args)


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
            raise TorchchatError(f"tensor {name!r} in {path.name} is no ordinary dense tensor",
                                 "save the model's weights as dense tensors")
    return tensors, model_args


def _load_torch(path: Path) -> Any:
    """torch.load that maps the file and unpickles tensors and plain values alone."""
    _check_readable(path)
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
        raise TorchchatError(f"cannot read {str(path)!r} as a PyTorch checkpoint: {_first_line(error)}",
                             DAMAGED) from None


def _first_line(error: Exception) -> str:
    """What torch says of a file, without its advice to load it unsafely."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return text.strip().partition("\n")[0][:200] or type(error).__name__


# ---- names --------------------------------------------------------------------------------------------------------


_TABLES = ("rope.freqs", "freqs_cos", "freqs_sin", "attention.mask", "rotary_emb.inv_freq")  # stored, but computed


def _weights(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without tables, and without the prefix that torch.compile and data parallelism put before every name."""
    return {name.removeprefix("_orig_mod.").removeprefix("module."): stored for name, stored in tensors.items()
            if not name.endswith(_TABLES)}


_META_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_META_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def _meta_name(name: str) -> str:
    """The canonical name of a tensor that Meta's files call `name`; an unknown name stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _META_TOP:
        return f"{_META_TOP[stem]}.{kind}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "layers" and parts[2] in _META_LAYER:
        return f"model.layers.{parts[1]}.{_META_LAYER[parts[2]]}.{kind}"
    return name


# Meta splits a model over files by rows (the output side) or by columns (the input side) of each matrix.
_SPLIT_BY_COLUMN = ("attention.wo.weight", "feed_forward.w2.weight")


def _merge_parallel(shards: list[dict[str, StoredTensor]]) -> Mapping[str, StoredTensor]:
    """Meta's model-parallel files as one: every file holds a part of every matrix."""
    first = shards[0]
    if len(shards) == 1:
        return first
    for shard in shards[1:]:
        if shard.keys() != first.keys():
            odd = min(shard.keys() ^ first.keys())
            raise TorchchatError(f"the checkpoint's files do not belong together: {odd!r} is not in all of them")
    return {name: _merged(name, [shard[name] for shard in shards], first) for name in first}


def _merged(name: str, parts: list[StoredTensor], first: Mapping[str, StoredTensor]) -> StoredTensor:
    shape = parts[0].shape
    if len(shape) < 2:
        return parts[0]
    if any(part.shape != shape for part in parts):
        raise TorchchatError(f"the checkpoint's files do not belong together: {name!r} has the shapes "
                             f"{' and '.join(str(list(part.shape)) for part in parts)}")
    if name == "tok_embeddings.weight":  # Llama 2 splits its columns, Llama 3 its rows
        whole_width = first["norm.weight"].shape[0] if "norm.weight" in first else shape[1]
        dimension = 1 if shape[1] != whole_width else 0
    else:
        dimension = 1 if name.endswith(_SPLIT_BY_COLUMN) else 0
    whole = tuple(sum(part.shape[axis] for part in parts) if axis == dimension else size
                  for axis, size in enumerate(shape))
    return StoredTensor(whole, partial(_joined, name, parts, dimension))


def _joined(name: str, parts: list[StoredTensor], dimension: int) -> Tensor:
    tensors = [part.read() for part in parts]
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise TorchchatError(f"the checkpoint's files do not belong together: {name!r} has different dtypes")
    return torch.cat(tensors, dimension)
