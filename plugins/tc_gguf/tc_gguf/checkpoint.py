"""A model in a GGUF file as a checkpoint: canonical names, weights mapped, unpacked or left packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tc_gguf.config import config_of
from tc_gguf.file import GgufFile, GgufTensor, read_split
from tc_gguf.quants import dequantizer
from tc_gguf.tensors import PLAIN, Mapping, Unpacker
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.quantization.blocks import FORMATS
from torchchat_core.specs import ModelFiles, ModelRef, PackedTensor


class GgufSource:
    """Implements `specs.ModelSource` for the format "gguf". The files are found by others."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        raise TorchchatError(f"tc-gguf opens GGUF files and fetches none: {quoted(ref.text)}")

    def open(self, files: ModelFiles) -> GgufCheckpoint:
        """Raises `TorchchatError` for a damaged file, and for a model that torchchat's transformer is not."""
        if files.config is not None:
            raise TorchchatError(f"{files.weights[0].name} states its own configuration; "
                                 f"{quoted_path(files.config.name)} cannot "
                                 "replace it", "leave --params-path out")
        return GgufCheckpoint(read_split(files.weights))


class GgufCheckpoint:
    """Implements `specs.PackedCheckpoint`. Tensors have torch's shapes, and the file's own order of rows.

    Queries and keys of some architectures are in the order of adjacent rotary pairs; `config.rope_interleaved` says so.
    """

    def __init__(self, file: GgufFile) -> None:
        self.config = config_of(file)
        self._tensors = {canonical_name(name): stored for name, stored in file.tensors.items()
                         if not name.endswith(_TABLES)}
        for stored in self._tensors.values():
            dequantizer(stored.type.name)  # refused before anything is read
        self._mappings: dict[Path, Mapping] = {}
        self._unpacker = Unpacker(sum(stored.size for stored in self._tensors.values()
                                      if stored.type.name not in PLAIN))

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    @property
    def dtype(self) -> torch.dtype:
        """Of the type that most numbers in matrices have; bfloat16 where that is quantised."""
        numbers: Counter[str] = Counter()
        for stored in self._tensors.values():
            if len(stored.shape) > 1:
                numbers[stored.type.name] += prod(stored.shape)
        return PLAIN.get(numbers.most_common(1)[0][0], torch.bfloat16)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Mapped where it is stored in `dtype`. Without one, quantised tensors become float32, as they stand for.

        Raises `KeyError` where there is no tensor of that name, `TorchchatError` where the file cannot be read.
        """
        stored = self._tensors[name]
        plain = PLAIN.get(stored.type.name)
        if plain is not None and dtype in (None, plain):
            return self._mapping(stored).tensor(stored, plain).view(stored.shape)
        return self._unpacker.unpack(stored, dtype or torch.float32)

    def block_format(self, name: str) -> str | None:
        kind = self._tensors[name].type.name
        return None if kind in PLAIN else kind

    def packed(self, name: str) -> PackedTensor | None:
        """In a mapping of its own, so that what was read of it does not stay in memory."""
        stored = self._tensors[name]
        kind = stored.type.name.lower()
        if kind not in FORMATS or len(stored.shape) != 2:
            return None
        data = Mapping(stored.path, stored).tensor(stored, torch.uint8).view(stored.shape[0], -1)
        return PackedTensor(kind=kind, shape=(stored.shape[0], stored.shape[1]), data=data)

    def _mapping(self, stored: GgufTensor) -> Mapping:
        if stored.path not in self._mappings:
            self._mappings[stored.path] = Mapping(stored.path)
        return self._mappings[stored.path]


# ---- names --------------------------------------------------------------------------------------------------------


_TABLES = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight",  # config.py reads them
           "attn_rot_embd.weight")  # computed from the configuration

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def canonical_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{kind}"
    return name
