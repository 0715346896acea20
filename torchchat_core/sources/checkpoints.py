"""Reading checkpoints: any of the containers, any of the naming schemes, one `Checkpoint` behind them.

A container is how tensors lie in a file (`containers`). A naming scheme is what they are called: Hugging Face's
("hf"), Meta's ("meta") or torchtune's own ("torchtune"). The two are independent.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.models.config import (
    ModelConfig,
    config_from_hugging_face,
    config_from_meta,
    refuse_unknown_architecture,
)
from torchchat_core.models.weights import weight_shapes
from torchchat_core.small_files import read_json
from torchchat_core.sources import torchtune
from torchchat_core.sources.containers import DAMAGED, Container, StoredTensor, read_container
from torchchat_core.sources.foreign_quantization import quantization_method, refuse_foreign_weights
from torchchat_core.specs import ModelFiles

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_NUMBERS = 1 << 20  # elements compared at a time
log = logging.getLogger(__name__)
SCHEMES = {"hf": "Hugging Face", "meta": "Meta", "torchtune": "torchtune"}
Tensors = Mapping[str, StoredTensor]


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


def open_checkpoint(files: ModelFiles, scheme: str | None = None, named: ModelConfig | None = None
                    ) -> StoredCheckpoint:
    """The checkpoint in `files`, of format "safetensors" or "pytorch". Weights are mapped, not read.

    `scheme`, one of `SCHEMES`, is what the tensors' names are expected to be. `named` is the model that somebody
    said it is: its sizes are taken where there is no config.json and no params.json, and compared where there is.
    Raises `TorchchatError` for a file that is missing, truncated, not of its format or scheme, or that holds code.
    """
    containers = [read_container(path, files.format == "safetensors") for path in _shards(files.weights)]
    shards = [_weights(container.tensors) for container in containers]
    if files.format == "safetensors" and any(name.endswith(".values") for shard in shards for name in shard):
        from torchchat_core.quantization.saved import open_quantised

        return open_quantised(files, _united(shards, files))
    found = _naming_scheme({name for shard in shards for name in shard})
    if scheme is not None and found != scheme:
        raise TorchchatError(f"{files.weights[0].name} is not of the format {quoted(scheme)}: its tensors have the "
                             "names of "
                             f"{SCHEMES[found]}", f"the format is {quoted(found)}")
    declared = _declared(files) if found != "meta" else {}
    if declared and (found == "hf" or "model_type" in declared):
        refuse_unknown_architecture(declared)
    if found == "meta":
        tensors: Tensors = {_meta_name(name): stored for name, stored in _merge_parallel(shards).items()}
    elif found == "torchtune":
        tensors = {torchtune.canonical_name(name): stored for name, stored in _united(shards, files).items()}
    else:
        tensors = _hugging_face_names(shards, files)
    config = _config(files, containers, found, tensors, named)
    method = quantization_method(declared)
    if method is not None:
        shapes = {name: stored.shape for name, stored in tensors.items()}
        refuse_foreign_weights(method, files.weights[0].name, shapes, weight_shapes(config))
    if config.tied_embeddings and HEAD in tensors:  # some files store the shared matrix as lm_head
        if EMBEDDING in tensors and not _equal(tensors[EMBEDDING], tensors[HEAD]):
            log.warning("config.json says \"tie_word_embeddings\": true, but %s holds two different matrices, %s and "
                        "%s; both are used", files.weights[0].name, EMBEDDING, HEAD)
            config = dataclasses.replace(config, tied_embeddings=False)
        tensors = {EMBEDDING: tensors[HEAD], **tensors}
    return StoredCheckpoint(config, tensors)


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Return True if two matrices hold the same numbers. Stops at the first block of rows that differs."""
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    one, other = first.read(), second.read()
    rows = max(1, COMPARED_NUMBERS // max(1, one[:1].numel()))
    return all(torch.equal(*(part[start : start + rows].float() for part in (one, other)))
               for start in range(0, len(one), rows))


def _naming_scheme(names: set[str]) -> str:
    if any(".attn.q_proj." in name or name.endswith(".scale") for name in names):
        return "torchtune"
    return "meta" if "tok_embeddings.weight" in names else "hf"


def _hugging_face_names(shards: list[dict[str, StoredTensor]], files: ModelFiles) -> Tensors:
    named = [{name if name.startswith(("model.", "lm_head.")) else f"model.{name}": stored
              for name, stored in shard.items()} for shard in shards]
    tensors = _united(named, files)
    if not tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        raise TorchchatError(f"{files.weights[0].name} holds no language model that torchchat knows: its tensors are "
                             f"called {', '.join(sorted(tensors)[:3]) or 'nothing at all'}")
    return tensors


def _united(shards: list[dict[str, StoredTensor]], files: ModelFiles) -> Tensors:
    """Files that each hold some of the tensors, whole."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            listed = ", ".join(path.name for path in files.weights)
            raise TorchchatError(f"{quoted(twice[0])} is in two of the files {listed}",
                                 "they belong to different models; name the one file that is meant")
        tensors |= shard
    return tensors


# ---- configuration ------------------------------------------------------------------------------------------------


def _config(files: ModelFiles, containers: list[Container], scheme: str, tensors: Tensors,
            named: ModelConfig | None) -> ModelConfig:
    """What the files say the model is like or, where they say nothing, what `named` says."""
    shapes = {name: stored.shape for name, stored in tensors.items()}
    stated = _stated_config(files, containers, scheme, shapes)
    if stated is not None:
        if named is not None:
            _check_same_sizes(stated, named, files)
        return stated
    if named is None:
        beside = "config.json" if scheme == "hf" else "params.json"
        raise TorchchatError(f"there is no {beside} beside {files.weights[0].name}",
                             "put it there, or name the file that states the model's sizes with --params-path")
    embedding = shapes.get("model.embed_tokens.weight", shapes.get("lm_head.weight", (named.vocab_size,)))
    return dataclasses.replace(named, vocab_size=embedding[0], tied_embeddings="lm_head.weight" not in shapes,
                               rope_interleaved=_interleaved(named.architecture, scheme))


def _stated_config(files: ModelFiles, containers: list[Container], scheme: str, shapes: Mapping[str, tuple[int, ...]]
                   ) -> ModelConfig | None:
    model_args = None if files.config_chosen else containers[0].model_args
    if scheme != "hf" and model_args is not None:
        return config_from_meta(model_args, shapes)
    if scheme == "hf" and files.config is not None and files.config.name == "params.json":
        return None
    params = _params(files) if scheme != "hf" else None
    if params is not None:
        return config_from_meta(read_json(params), shapes)
    if files.config is None:
        return None
    raw = read_json(files.config)
    if scheme != "hf" and "model_type" not in raw:  # a params.json by another name
        return config_from_meta(raw, shapes)
    config = config_from_hugging_face(raw)
    if scheme == "hf":
        return config
    return dataclasses.replace(config, rope_interleaved=_interleaved(config.architecture, scheme),
                               tied_embeddings="lm_head.weight" not in shapes)


def _declared(files: ModelFiles) -> Mapping[str, Any]:
    """Return the content of Hugging Face's config.json; empty if there is none, or another kind of file."""
    raw = read_json(files.config) if files.config is not None and files.config.suffix == ".json" else {}
    return raw if files.config is not None and (files.config.name == "config.json" or "model_type" in raw) else {}


def _params(files: ModelFiles) -> Path | None:
    """Meta's params.json: folders of hubs keep a config.json too, and Meta's names go with Meta's file."""
    if files.config is None or files.config.name != "config.json":
        return files.config
    places = (files.config.parent / "params.json", files.config.parent / "original" / "params.json")
    return next((path for path in places if path.is_file()), None)


def _interleaved(architecture: str, scheme: str) -> bool:
    """Whether the rotary pairs are neighbours: with Meta's names always, with torchtune's for all but Qwen."""
    return scheme == "meta" or (scheme == "torchtune" and not architecture.startswith("qwen"))


def _check_same_sizes(stated: ModelConfig, named: ModelConfig, files: ModelFiles) -> None:
    for size in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(stated, size) != getattr(named, size):
            raise TorchchatError(f"{files.weights[0].name} is another model than the one named: {size} is "
                                 f"{getattr(stated, size)}, not {getattr(named, size)}", "leave the model's name out")


# ---- files --------------------------------------------------------------------------------------------------------


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
            raise TorchchatError(f"{index.name} points to {quoted(name)}, outside its own folder")
        if not (index.parent / name).is_file():
            raise TorchchatError(f"{index.name} names {quoted(name)}, which is not in "
                                 f"{quoted_path(str(index.parent))}", DAMAGED)
    return [index.parent / name for name in names]


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
            raise TorchchatError(f"the checkpoint's files do not belong together: {quoted(odd)} is not in all of them")
    return {name: _merged(name, [shard[name] for shard in shards], first) for name in first}


def _merged(name: str, parts: list[StoredTensor], first: Mapping[str, StoredTensor]) -> StoredTensor:
    shape = parts[0].shape
    if len(shape) < 2:
        return parts[0]
    if any(part.shape != shape for part in parts):
        raise TorchchatError(f"the checkpoint's files do not belong together: {quoted(name)} has the shapes "
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
        raise TorchchatError(f"the checkpoint's files do not belong together: {quoted(name)} has different dtypes")
    return torch.cat(tensors, dimension)
