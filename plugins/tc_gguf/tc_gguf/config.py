"""From the metadata of a GGUF file to `ModelConfig`.

Keys and their meaning are those of llama.cpp (gguf-py/gguf/constants.py, llama-model.cpp). What the transformer does
not have is refused rather than left out.
"""

from __future__ import annotations

import logging
import math
import re
from array import array
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tc_gguf.file import DAMAGED, GgufFile
from tc_gguf.tensors import Unpacker
from tc_gguf.values import shown
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig, RopeScaling, extended_context

log = logging.getLogger(__name__)
Fields = TypeVar("Fields", ModelConfig, RopeScaling)
OTHER_MODEL = "fetch a model of an architecture that torchchat knows, or run this one with llama.cpp"


@dataclass(frozen=True)
class Architecture:
    """What does not stand in the file's metadata."""

    name: str  # model_type of Hugging Face's config.json
    interleaved: bool  # whether the rows of queries and keys are in the order of adjacent rotary pairs


ARCHITECTURES = {
    "llama": Architecture("llama", True),  # and Mistral's models before the third
    "mistral3": Architecture("mistral", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
    "granite": Architecture("granite", True),
}
LAYER = re.compile(r"blk\.([^.]+)\.")
# Fields of `ModelConfig` and `RopeScaling`, and the keys that they are read from, which messages name.
KEYS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_layers": "block_count",
    "num_heads": "attention.head_count", "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_context": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window", "logits_divisor": "logit_scale",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow",
}


def config_of(file: GgufFile) -> ModelConfig:
    """The configuration of the model in `file`.

    Raises `TorchchatError` for an architecture that torchchat does not know, for a key that is missing or wrong, and
    for variations that torchchat's transformer does not have.
    """
    key = file.text("general.architecture")
    if key not in ARCHITECTURES:
        raise TorchchatError(f"{file.path.name} is of the unknown architecture {quoted(key)}; known are "
                             f"{', '.join(ARCHITECTURES)}", OTHER_MODEL)
    _refuse_variations(file, key)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise TorchchatError(f"{file.path.name} has no matrix 'token_embd.weight'",
                             "it holds a vocabulary or an adapter alone; fetch the whole model")
    layers = _layers(file, key)
    heads = _for_all_layers(file, f"{key}.attention.head_count", layers)
    hidden = file.integer(f"{key}.embedding_length")
    if hidden != embedding.shape[1]:
        raise TorchchatError(f"{key}.embedding_length is {hidden} in {file.path.name}, whose token_embd.weight has "
                             f"{embedding.shape[1]} columns", DAMAGED)
    head_dim = _head_dim(file, key, hidden, heads)
    scaling = _rope_scaling(file, key, head_dim)
    return _checked(
        file, key, ModelConfig,
        architecture=ARCHITECTURES[key].name,
        vocab_size=_vocabulary_size(file, key, embedding.shape[0]),
        hidden_size=hidden,
        intermediate_size=_for_all_layers(file, f"{key}.feed_forward_length", layers),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_for_all_layers(file, f"{key}.attention.head_count_kv", layers, heads),
        head_dim=head_dim,
        max_context=extended_context(file.integer(f"{key}.context_length"), scaling),
        norm_eps=file.number(f"{key}.attention.layer_norm_rms_epsilon"),
        rope_theta=_rope_theta(file, key),
        rope_scaling=scaling,
        rope_interleaved=ARCHITECTURES[key].interleaved,
        tied_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=file.integer(f"{key}.attention.sliding_window", 0) or None,
        embedding_multiplier=file.number(f"{key}.embedding_scale", 1.0),
        attention_multiplier=file.number(f"{key}.attention.scale", 0.0) or None,
        residual_multiplier=file.number(f"{key}.residual_scale", 1.0),
        logits_divisor=file.number(f"{key}.logit_scale", 1.0),
    )


def _checked(file: GgufFile, key: str, made: type[Fields], /, **fields: Any) -> Fields:
    """What the core makes of the fields; what it refuses is told by the name of the file and of its keys."""
    try:
        return made(**fields)
    except TorchchatError as error:
        named = re.sub(r"\w+", lambda word: f"{key}.{KEYS[word[0]]}" if word[0] in KEYS else word[0], error.message)
        raise TorchchatError(f"in {file.path.name}, {named}", DAMAGED) from error


def _refuse_variations(file: GgufFile, key: str) -> None:
    """What files of these architectures can state and torchchat's transformer does not have."""
    if file.integer(f"{key}.expert_count", 0) > 0:
        raise TorchchatError(f"{file.path.name} is a mixture of {file.integer(f'{key}.expert_count')} experts, which "
                             "torchchat's transformer does not have", OTHER_MODEL)
    if not file.boolean(f"{key}.attention.causal", True):
        raise TorchchatError(f"{file.path.name} holds an encoder, whose attention is not causal", OTHER_MODEL)
    if key == "granite" and not file.boolean(f"{key}.rope.scaling.finetuned", True):
        raise TorchchatError(f"{file.path.name} has no rotary position embedding, which torchchat's transformer needs",
                             OTHER_MODEL)
    for name in ("attention.sliding_window_pattern", "attention.temperature_scale", "attention.clamp_kqv",
                 "attn_logit_softcapping", "final_logit_softcapping"):
        value = file.metadata.get(f"{key}.{name}", 0)
        if value not in (0, False):
            raise TorchchatError(f"{key}.{name} is {shown(value)} in {file.path.name}; torchchat's transformer does "
                                 "not have that", OTHER_MODEL)


def _vocabulary_size(file: GgufFile, key: str, rows: int) -> int:
    """Return the number of rows of the embedding. In a file with a tokenizer, vocab_size may be stale."""
    stated = file.integer(f"{key}.vocab_size", rows)
    if stated != rows and "tokenizer.ggml.tokens" in file.metadata:
        log.warning("%s: %s.vocab_size is %s, but token_embd.weight has %d rows; using %d", file.path.name, key,
                    quoted(stated), rows, rows)
    elif stated != rows:
        raise TorchchatError(f"{key}.vocab_size is {stated} in {file.path.name}, whose token_embd.weight has {rows} "
                             "rows", DAMAGED)
    return rows


def _layers(file: GgufFile, key: str) -> int:
    """The number of layers, which those that the tensors belong to have to be: 0, 1 and so on."""
    stated = file.integer(f"{key}.block_count")
    present = {found[1] for name in file.tensors if (found := LAYER.match(name))}
    missing = next((layer for layer in range(min(stated, len(present) + 1)) if str(layer) not in present), None)
    if missing is not None or len(present) != stated:
        raise TorchchatError(f"{key}.block_count is {stated} in {file.path.name}, which has the tensors of "
                             f"{len(present)} layers" + ("" if missing is None else f", and none of blk.{missing}"),
                             DAMAGED)
    return stated


def _for_all_layers(file: GgufFile, key: str, layers: int, default: int | None = None) -> int:
    """A number that stands in the file once, or once for each layer; the layers have to agree."""
    if not isinstance(file.metadata.get(key), array):
        return file.integer(key, default)
    entries = file.integers(key)
    if len(entries) != layers:
        raise TorchchatError(f"{key} has {len(entries)} entries in {file.path.name}, for {layers} layers", DAMAGED)
    values = set(entries)
    if len(values) != 1:
        raise TorchchatError(f"{key} differs from layer to layer in {file.path.name}: {quoted(sorted(values))}; "
                             "torchchat's transformer has the same for all", OTHER_MODEL)
    return values.pop()


def _head_dim(file: GgufFile, key: str, hidden: int, heads: int) -> int:
    if f"{key}.attention.key_length" not in file.metadata and (heads < 1 or hidden % heads):
        raise TorchchatError(f"{key}.embedding_length {hidden} is not a multiple of {key}.attention.head_count {heads} "
                             f"in {file.path.name}, and there is no {key}.attention.key_length", DAMAGED)
    length = file.integer(f"{key}.attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if file.integer(f"{key}.{name}", length) != length:
            raise TorchchatError(f"{key}.{name} is {file.integer(f'{key}.{name}')} in {file.path.name}; torchchat's "
                                 f"transformer needs it to be the size of a head, {length}", OTHER_MODEL)
    return length


# ---- rotary position embedding ------------------------------------------------------------------------------------


def _rope_theta(file: GgufFile, key: str) -> float:
    return file.number(f"{key}.rope.freq_base", 10000.0)


def _rope_scaling(file: GgufFile, key: str, head_dim: int) -> RopeScaling | None:
    """How the file stretches rotary frequencies: by its keys, or by a table of factors that divide them."""
    kind = file.text(f"{key}.rope.scaling.type", "linear")  # what llama.cpp takes it for
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise TorchchatError(f"{key}.rope.scaling.type is {quoted(kind)} in {file.path.name}; known are none, "
                             "linear, yarn and longrope", OTHER_MODEL)
    factor = _factor(file, key) if kind != "none" else 1.0
    amplitude = file.number(f"{key}.rope.scaling.attn_factor", 1.0)
    tables = _tables(file, head_dim)
    if kind == "yarn":
        if tables:
            raise TorchchatError(f"{file.path.name} has both YaRN and a table of rotary factors, which is unknown",
                                 OTHER_MODEL)
        return _yarn(file, key, factor, amplitude)
    if not tables and amplitude == 1.0:
        if factor == 1.0:
            return None
        return _checked(file, key, RopeScaling, kind="linear", factor=factor,
                        original_context=_original_context(file, key))
    short, long = tables or ((1.0,) * (head_dim // 2),) * 2
    if short == long and factor == amplitude == 1.0 and _is_llama3(short, _rope_theta(file, key)):
        return RopeScaling(kind="llama3", factor=max(short), original_context=LLAMA3_CONTEXT)
    return _checked(
        file, key, RopeScaling, kind="longrope", attention_factor=amplitude,
        original_context=_original_context(file, key),
        short_factor=tuple(each * factor for each in short), long_factor=tuple(each * factor for each in long),
    )


def _factor(file: GgufFile, key: str) -> float:
    """What positions are divided by; files before rope.scaling.* have rope.scale_linear. 0 stands for none."""
    factor = file.number(f"{key}.rope.scaling.factor", file.number(f"{key}.rope.scale_linear", 1.0)) or 1.0
    if factor < 0:
        raise TorchchatError(f"{key}.rope.scaling.factor is {factor} in {file.path.name}; it has to be positive",
                             DAMAGED)
    return factor


def _original_context(file: GgufFile, key: str) -> int:
    trained = file.integer(f"{key}.rope.scaling.original_context_length", 0)
    return trained or file.integer(f"{key}.context_length")


def _yarn(file: GgufFile, key: str, factor: float, amplitude: float) -> RopeScaling:
    """llama.cpp multiplies cos and sin by attn_factor and YaRN's own temperature (llama-context.cpp)."""
    for name, only in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0)):
        if file.number(f"{key}.rope.scaling.{name}", only) not in (only, -1.0):  # -1: not set
            raise TorchchatError(f"{key}.rope.scaling.{name} is {file.number(f'{key}.rope.scaling.{name}')} in "
                                 f"{file.path.name}; torchchat knows {only} alone", OTHER_MODEL)
    logarithm = math.log(factor) if factor > 1.0 else 0.0
    # llama.cpp reads this one for mistral3 alone, of the architectures that are known here.
    weight = file.number(f"{key}.rope.scaling.yarn_log_multiplier", 0.0) if key == "mistral3" else 0.0
    divisor = 0.1 * weight * logarithm + 1.0
    if divisor <= 0:
        raise TorchchatError(f"{key}.rope.scaling.yarn_log_multiplier is {weight} in {file.path.name}; it must not be "
                             "negative", DAMAGED)
    return _checked(
        file, key, RopeScaling, kind="yarn", factor=factor, original_context=_original_context(file, key),
        beta_fast=file.number(f"{key}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=file.number(f"{key}.rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=amplitude * (0.1 * logarithm + 1.0) / divisor,
    )


def _tables(file: GgufFile, head_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The factors for short and for long sequences, one for each frequency, where the file has them."""
    if "rope_freqs.weight" in file.tensors:
        return (_table(file, "rope_freqs.weight", head_dim // 2),) * 2
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    if not any(name in file.tensors for name in names):
        return None
    short, long = (_table(file, name, head_dim // 2) for name in names)
    return short, long


def _table(file: GgufFile, name: str, count: int) -> tuple[float, ...]:
    stored = file.tensors.get(name)
    if stored is None or stored.type.name != "F32" or math.prod(stored.shape) != count:
        stated = "missing" if stored is None else f"{list(stored.shape)} of {stored.type.name}"
        raise TorchchatError(f"{name} is {stated} in {file.path.name}; it has to be {count} numbers of type F32",
                             DAMAGED)
    factors = tuple(Unpacker().unpack(stored, torch.float32).flatten().tolist())
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise TorchchatError(f"{name} holds a factor that is no positive number in {file.path.name}", DAMAGED)
    return factors


LLAMA3_CONTEXT = 8192  # positions that Llama 3 was trained with before it was stretched


def _is_llama3(factors: tuple[float, ...], theta: float) -> bool:
    """Whether these are the factors of Llama 3.1's scaling, with its low factor 1 and high factor 4.

    Then the rule itself gives the same frequencies as Hugging Face's config.json of the model does.
    """
    largest = max(factors)
    for index, stated in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (index / len(factors))
        smooth = min(max((LLAMA3_CONTEXT / wavelength - 1.0) / 3.0, 0.0), 1.0)
        if not math.isclose(stated, 1.0 / (smooth + (1.0 - smooth) / largest), rel_tol=2e-6):
            return False
    return largest > 1.0
