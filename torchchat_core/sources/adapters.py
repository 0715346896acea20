"""LoRA adapters in the format of the PEFT library, merged into a checkpoint's weights as they are read.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds scale * B @ A to a matrix W; the scale is alpha/rank, or alpha/sqrt(rank)
with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). DoRA (Liu et al. 2024, arXiv:2402.09353) then gives every row of
the sum the length in `lora_magnitude_vector`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.rope_layout import interleaved_rows
from torchchat_core.models.weights import weight_shapes
from torchchat_core.sources.adapter_settings import MERGE, AdapterSettings, read_settings
from torchchat_core.sources.containers import StoredTensor, read_container
from torchchat_core.specs import Checkpoint, PackedTensor

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNCHANGED = (".original_module.weight", ".original_module.bias")
DEFAULT_NAME = re.compile(r"\.default(?=\.|$)")  # of an adapter, inside the names of a state_dict
ANOTHER_MODEL = "the adapter belongs to another model, or its files are damaged"


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint as it is with the LoRA adapter in `folder` (adapter_config.json and its weights) merged.

    The sums are formed in float32 when a tensor is asked for, then given in the dtype that was asked for. Where
    input and output embedding are one and the adapter changes one of them, they become two. The folder's
    `base_model_name_or_path` is not compared with anything; the shapes of all weights are.
    Raises `TorchchatError` for an adapter of another kind, or with a weight that this model has no place for.
    """
    settings = read_settings(folder)
    parts = _Parts(settings)
    for name, stored in _weights(folder).items():
        parts.add(name, stored)
    parts.check_vocabulary(checkpoint.config)
    config = _untied(checkpoint.config, parts.touched(), settings)
    shapes = weight_shapes(config)
    changes = parts.changes(config, shapes)
    kind = _PackedAdapted if hasattr(checkpoint, "packed") else _Adapted
    return kind(checkpoint, config, changes)


def _weights(folder: Path) -> Mapping[str, StoredTensor]:
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise TorchchatError(f"the adapter {quoted_path(str(folder))} has no {' and no '.join(WEIGHT_FILES)}",
                             "give the folder that PEFT or torchtune wrote")
    tensors = read_container(path, path.suffix == ".safetensors").tensors
    if not tensors:
        raise TorchchatError(f"{quoted_path(str(path))} holds no weights", "save the adapter again")
    return tensors


def _untied(config: ModelConfig, touched: set[str], settings: AdapterSettings) -> ModelConfig:
    """One matrix that is input and output embedding becomes two where only one of them is changed, or both apart."""
    if not config.tied_embeddings or not touched & {EMBEDDING, HEAD}:
        return config
    if settings.ensures_tying and HEAD not in touched:
        return config
    return dataclasses.replace(config, tied_embeddings=False)


# ---- the weights of an adapter, by what they belong to ------------------------------------------------------------


@dataclass(kw_only=True)
class Change:
    """What an adapter does to one tensor of the model: whole replacement, LoRA, DoRA, or an addition to a bias."""

    whole: StoredTensor | None = None
    a: StoredTensor | None = None  # [rank, inputs]
    b: StoredTensor | None = None  # [outputs, rank]
    magnitude: StoredTensor | None = None  # [outputs]
    addition: StoredTensor | None = None  # [outputs], times the scale
    embedding: bool = False  # A is [rank, vocabulary] and B is [hidden, rank]: the product is transposed
    scale: float = 1.0

    @property
    def lora(self) -> tuple[StoredTensor, StoredTensor] | None:
        return (self.a, self.b) if self.a is not None and self.b is not None else None

    def rows(self) -> int | None:
        """Return the number of rows of the changed matrix, or None if it is unknown."""
        if self.whole is not None:
            return self.whole.shape[0] if self.whole.shape else None
        part, axis = (self.a, 1) if self.embedding else (self.b, 0)
        return part.shape[axis] if part is not None and len(part.shape) == 2 else None


# How a name goes on after that of a layer -> the field of `Change`, and the tensor of the layer that it changes.
_ENDINGS = {
    "lora_A.weight": ("a", "weight"),
    "lora_B.weight": ("b", "weight"),
    "lora_embedding_A": ("a", "weight"),
    "lora_embedding_B": ("b", "weight"),
    "lora_magnitude_vector": ("magnitude", "weight"),
    "lora_magnitude_vector.weight": ("magnitude", "weight"),
    "lora_B.bias": ("addition", "bias"),
    "base_layer.weight": ("whole", "weight"),
    "base_layer.bias": ("whole", "bias"),
    "modules_to_save.weight": ("whole", "weight"),
    "modules_to_save.bias": ("whole", "bias"),
    "weight": ("whole", "weight"),
    "bias": ("whole", "bias"),
}


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    """Return True if the tensors are equal. PEFT saves resized embeddings as NAME.weight and
    NAME.modules_to_save.weight."""
    return first.shape == second.shape and torch.equal(first.read(), second.read())


class _Parts:
    """Sorts an adapter's weights by the tensor of the model that they change."""

    def __init__(self, settings: AdapterSettings) -> None:
        self._settings = settings
        self._changes: dict[str, Change] = {}

    def add(self, name: str, stored: StoredTensor) -> None:
        """Raises `TorchchatError` for a name of no known form, or one that comes twice."""
        short = DEFAULT_NAME.sub("", name.removeprefix("base_model.model."))
        if short.endswith(UNCHANGED):  # PEFT saves the original matrix next to the trained one
            return
        ending = next((ending for ending in _ENDINGS if short.endswith(f".{ending}")), None)
        if ending is None:
            raise TorchchatError(f"the adapter has a weight {quoted(name)}, which is not a LoRA weight", ANOTHER_MODEL)
        layer = short.removesuffix(f".{ending}")
        field, attribute = _ENDINGS[ending]
        prefix = "" if layer == "lm_head" or layer.startswith("model.") else "model."
        change = self._changes.setdefault(f"{prefix}{layer}.{attribute}", Change())
        present = getattr(change, field)
        if present is not None and not (field == "whole" and _same(present, stored)):
            raise TorchchatError(f"the adapter has the weight {quoted(name)} twice, under two names", ANOTHER_MODEL)
        setattr(change, field, stored)
        change.embedding = change.embedding or ending.startswith("lora_embedding")

    def check_vocabulary(self, config: ModelConfig) -> None:
        """Raise `TorchchatError` if the adapter was trained with a vocabulary of another size than the model's."""
        for name in (EMBEDDING, HEAD):
            change = self._changes.get(name)
            rows = None if change is None else change.rows()
            if rows is not None and rows != config.vocab_size:
                raise TorchchatError(f"the adapter's {name} has {rows} tokens, but the model has {config.vocab_size}: "
                                     "the vocabulary was resized before the adapter was trained", MERGE)

    def touched(self) -> set[str]:
        """The canonical names of the tensors that change."""
        return set(self._changes)

    def changes(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
        """By canonical name, with scales. Raises `TorchchatError` where the model has no such tensor, or another."""
        for name, change in self._changes.items():
            if name not in shapes:
                raise TorchchatError(f"the adapter changes {quoted(name)}, which a {config.architecture} model with "
                                     f"{config.num_layers} layers does not have", ANOTHER_MODEL)
            layer = name.rpartition(".")[0]
            self._check(name, change, shapes[name], layer)
            change.scale = self._settings.scale(layer)
        return self._changes

    def _check(self, name: str, change: Change, shape: tuple[int, ...], layer: str) -> None:
        rank = self._settings.rank(layer)
        if (change.a is None) != (change.b is None):
            raise TorchchatError(f"the adapter has only one of the two matrices, A and B, for {quoted(name)}",
                                 ANOTHER_MODEL)
        if change.a is not None and len(shape) != 2:
            raise TorchchatError(f"the adapter has matrices for {quoted(name)}, which is none", ANOTHER_MODEL)
        if change.magnitude is not None and (change.a is None or change.embedding):
            raise TorchchatError(f"the adapter changes {quoted(name)} by DoRA, which only linear layers take here",
                                 MERGE)
        if self._settings.dora and change.a is not None and change.magnitude is None:
            raise TorchchatError(f"the adapter is a DoRA adapter and has no lora_magnitude_vector for {quoted(name)}",
                                 ANOTHER_MODEL)
        outputs, inputs = shape[-1 if change.embedding else 0], shape[0 if change.embedding else -1]
        for stored, wanted in ((change.whole, shape), (change.a, (rank, inputs)), (change.b, (outputs, rank)),
                               (change.addition, shape)):
            if stored is not None and stored.shape != wanted:
                raise TorchchatError(f"the adapter's weight for {quoted(name)} has the shape {list(stored.shape)}; "
                                     "the model "
                                     f"and the adapter's rank {rank} ask for {list(wanted)}", ANOTHER_MODEL)
        if change.magnitude is not None and change.magnitude.shape not in ((outputs,), (outputs, 1)):
            raise TorchchatError(f"the adapter's magnitudes for {quoted(name)} have the shape "
                                 f"{list(change.magnitude.shape)}; the model asks for {[outputs]}", ANOTHER_MODEL)


# ---- the checkpoint with the adapter ------------------------------------------------------------------------------


class _Adapted:
    """Implements `specs.Checkpoint` over another one and what an adapter changes of it."""

    def __init__(self, base: Checkpoint, config: ModelConfig, changes: Mapping[str, Change]) -> None:
        self.config = config
        self._base = base
        self._changes = changes

    @property
    def dtype(self) -> torch.dtype:
        return self._base.dtype

    def names(self) -> Iterable[str]:
        names = dict.fromkeys(self._base.names())
        return [*names, HEAD] if self._splits_head() and HEAD not in names else list(names)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return self._base.tensor(self._base_name(name), dtype)
        return self._changed(name, change).to(dtype if dtype is not None else self.dtype)

    def _splits_head(self) -> bool:
        return self._base.config.tied_embeddings and not self.config.tied_embeddings

    def _base_name(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self._splits_head() else name

    def _changed(self, name: str, change: Change) -> Tensor:
        """The tensor in float32. Raises `TorchchatError` where it is not finite, or the adapter holds no numbers."""
        if change.whole is not None:
            value = self._ordered(name, _numbers(name, change.whole))
        else:
            value = self._base.tensor(self._base_name(name), torch.float32)
        if change.lora is not None:
            a, b = (_numbers(name, stored) for stored in change.lora)
            a, b = (b.T, a.T) if change.embedding else (a, b)
            value = torch.addmm(value.float(), self._ordered(name, b), a, alpha=change.scale)
        if change.magnitude is not None:
            lengths = self._ordered(name, _numbers(name, change.magnitude).flatten())
            value.mul_((lengths / torch.linalg.vector_norm(value, dim=1))[:, None])
        if change.addition is not None:
            value = value.float() + change.scale * self._ordered(name, _numbers(name, change.addition))
        if not value.isfinite().all():
            raise TorchchatError(f"{quoted(name)} with the adapter holds values that are no finite numbers",
                                 "the adapter is damaged, or its training failed: save it again")
        return value

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of queries and keys in the order of the checkpoint; adapters have Hugging Face's."""
        layer = name.rpartition(".")[0]
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads, "q_norm": 1, "k_norm": 1
                 }.get(layer.rpartition(".")[2])
        return interleaved_rows(rows, heads) if heads is not None and self.config.rope_interleaved else rows


def _numbers(name: str, stored: StoredTensor) -> Tensor:
    """A weight of the adapter in float32. Raises `TorchchatError` where it is of no floating-point type."""
    tensor = stored.read()
    if not tensor.is_floating_point():
        raise TorchchatError(f"the adapter's weight for {quoted(name)} is of "
                             f"{str(tensor.dtype).removeprefix('torch.')}; "
                             "floating point is needed", ANOTHER_MODEL)
    return tensor.float()


class _PackedAdapted(_Adapted):
    """Implements `specs.PackedCheckpoint`: what the adapter leaves alone stays packed."""

    def packed(self, name: str) -> PackedTensor | None:
        if name in self._changes:
            return None
        packed: PackedTensor | None = self._base.packed(self._base_name(name))  # type: ignore[attr-defined]
        return packed
