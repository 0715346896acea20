"""`ModelConfig`: what a decoder-only transformer looks like, whoever wrote it down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torchchat_core.errors import TorchchatError, quoted

MAXIMUM_LAYERS = 1024
MAXIMUM_SIZE = 1 << 22  # of any dimension: larger ones are a damaged or hostile file
OTHER_MODEL = "choose a model of one of these architectures: torchchat list"
MAX_ROTATIONS = 1e9  # bound on YaRN's beta_fast and beta_slow, in rotations within a context
EXTENDING = ("linear", "dynamic", "yarn")  # kinds of rope scaling whose factor multiplies the context


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary position embedding is stretched beyond the context that a model was trained with.

    `kind` is `linear`, `dynamic`, `llama3`, `yarn` or `longrope`. The fields have the meaning and the names of
    `rope_scaling` in Hugging Face's config.json; those that a kind does not use keep their defaults.
    """

    kind: str
    factor: float = 1.0
    original_context: int | None = None  # positions the model saw before it was stretched
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: correction range rounded to whole dimensions
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin
    mscale: float | None = None  # yarn, as DeepSeek uses it
    mscale_all_dim: float | None = None  # yarn, likewise
    short_factor: tuple[float, ...] = ()  # longrope, one per frequency
    long_factor: tuple[float, ...] = ()  # longrope, likewise

    def __post_init__(self) -> None:
        for name in ("factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"):
            _check_positive(name, getattr(self, name), MAX_ROTATIONS if name.startswith("beta") else None)
        if self.original_context is not None:
            _check_size("original_max_position_embeddings", self.original_context, MAXIMUM_SIZE, minimum=2)
        if self.low_frequency_factor == self.high_frequency_factor:
            raise TorchchatError(f"low_freq_factor and high_freq_factor are both {self.low_frequency_factor}; they "
                                 "have to differ")
        for factor in (*self.short_factor, *self.long_factor):
            _check_positive("a longrope factor", factor)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer: sizes, and which of the known variations it has.

    Everything a runtime needs to build the model without knowing where its files came from.
    """

    architecture: str  # model_type of config.json; "llama" for Meta and llama2.c files
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int  # positions, prompt and answer together
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = False  # True: dimensions 2i and 2i+1 are a pair (Meta); False: i and i+half (Hugging Face)
    tied_embeddings: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on queries and keys
    sliding_window: int | None = None  # positions that a token sees, itself included
    sliding_layers: tuple[bool, ...] | None = None  # which layers have the window; None: all of them
    embedding_multiplier: float = 1.0  # Granite, as are the next three
    attention_multiplier: float | None = None  # softmax scale; None: 1/sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
                     "max_context"):
            _check_size(name, getattr(self, name), MAXIMUM_SIZE)
        _check_size("num_layers", self.num_layers, MAXIMUM_LAYERS)
        if self.num_heads % self.num_kv_heads:
            raise TorchchatError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
                "the config file is damaged or of a model that torchchat does not know",
            )
        if self.head_dim % 2:
            raise TorchchatError(f"head_dim {self.head_dim} is odd; rotary position embedding needs an even one")
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window, MAXIMUM_SIZE)
        for name in ("norm_eps", "rope_theta", "logits_divisor"):
            _check_positive(name, getattr(self, name))
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "dynamic" and (scaling.original_context is None
                                                                  or self.head_dim <= 2):
            raise TorchchatError("dynamic NTK scaling needs the original context and a head_dim greater than 2")
        if self.rope_theta == 1.0:
            raise TorchchatError("rope_theta is 1.0; all positions would be the same")
        for name in ("hidden_size", "intermediate_size", "num_heads"):
            _check_size(f"{name} times head_dim", getattr(self, name) * self.head_dim, MAXIMUM_SIZE << 8)

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by before softmax."""
        return self.attention_multiplier if self.attention_multiplier is not None else self.head_dim**-0.5

    def layer_window(self, layer: int) -> int | None:
        """Positions that a token of this layer sees, itself included; None where it sees all before it."""
        if self.sliding_layers is not None and not self.sliding_layers[layer]:
            return None
        return self.sliding_window


def _check_size(name: str, value: object, maximum: int, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise TorchchatError(f"{name} is {quoted(value)}; it has to be a whole number from {minimum} to {maximum}",
                             "the config file is damaged or of a model that torchchat does not know")


def _check_positive(name: str, value: float, maximum: float | None = None) -> None:
    if not (math.isfinite(value) and value > 0 and (maximum is None or value <= maximum)):
        bound = "" if maximum is None else f" of at most {maximum:g}"
        raise TorchchatError(f"{name} is {quoted(value)}; it has to be a positive number{bound}")


# ---- Hugging Face config.json -------------------------------------------------------------------------------------


def config_from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` from the dictionary in a Hugging Face config.json.

    Raises `TorchchatError` for an architecture that torchchat does not know, or a field that is missing or wrong.
    """
    refuse_unknown_architecture(raw)
    model_type = raw["model_type"]
    adapt = ARCHITECTURES[model_type]
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise TorchchatError(f"hidden_act is {quoted(activation)}; torchchat's transformer supports only silu")
    heads = _required(raw, "num_attention_heads")
    hidden = _required(raw, "hidden_size")
    if not raw.get("head_dim") and heads and hidden % heads:
        raise TorchchatError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim "
                             "is given")
    scaling = _rope_scaling(raw)
    common: dict[str, Any] = {
        "architecture": model_type,
        "vocab_size": _required(raw, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _required(raw, "intermediate_size"),
        "num_layers": _required(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or hidden // max(heads, 1),
        "max_context": extended_context(_required(raw, "max_position_embeddings"), scaling),
        "norm_eps": _number(raw, "rms_norm_eps", 1e-6),
        "rope_theta": _number(_rope_fields(raw), "rope_theta", 10000.0),
        "rope_scaling": scaling,
        "tied_embeddings": _boolean(raw, "tie_word_embeddings"),
    }
    return ModelConfig(**{**common, **adapt(raw)})


def refuse_unknown_architecture(raw: Mapping[str, Any]) -> None:
    """Raise a `TorchchatError` that names the model_type if config.json has an unsupported architecture."""
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return
    known = f"known are {', '.join(ARCHITECTURES)}"
    if model_type is None:
        raise TorchchatError(f"config.json names no architecture (\"model_type\"); {known}", OTHER_MODEL)
    raise TorchchatError(f"unknown architecture {quoted(model_type)} (\"model_type\" in config.json); {known}",
                         OTHER_MODEL)


def extended_context(positions: int, scaling: RopeScaling | None) -> int:
    """Return the maximum context of a model whose config states `positions`, as vLLM computes it.

    YaRN, linear and dynamic scaling extend the context to `factor` times the original one, even if the config states
    only the scaling. A larger stated number of positions is kept.
    """
    if scaling is None or scaling.kind not in EXTENDING:
        return positions
    return max(positions, int(min(scaling.factor * (scaling.original_context or positions), MAXIMUM_SIZE)))


def _llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = _boolean(raw, "attention_bias")
    return {"attention_bias": bias, "attention_output_bias": bias, "mlp_bias": _boolean(raw, "mlp_bias")}


def _mistral(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": raw.get("sliding_window")}


def _qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": True, **_qwen_window(raw)}


def _qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = _boolean(raw, "attention_bias")
    return {"attention_bias": bias, "attention_output_bias": bias, "qk_norm": True, **_qwen_window(raw)}


def _qwen_window(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's sliding window holds for the layers from `max_window_layers` on, and only when it is switched on."""
    if not _boolean(raw, "use_sliding_window") or not raw.get("sliding_window"):
        return {}
    layers = _required(raw, "num_hidden_layers")
    _check_size("num_hidden_layers", layers, MAXIMUM_LAYERS)
    kinds = raw.get("layer_types")
    if kinds is None:
        first = _required(raw, "max_window_layers") if "max_window_layers" in raw else 28
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise TorchchatError(f"layer_types is {quoted(kinds)}; it has to be a list of {layers} names, one for "
                             "each layer")
    return {"sliding_window": raw["sliding_window"],
            "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds)}


def _granite(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_llama(raw),
        "embedding_multiplier": _number(raw, "embedding_multiplier", 1.0),
        "attention_multiplier": _number(raw, "attention_multiplier", 1.0),
        "residual_multiplier": _number(raw, "residual_multiplier", 1.0),
        "logits_divisor": _number(raw, "logits_scaling", 1.0),
    }


ARCHITECTURES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "granite": _granite}


def _rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_theta` stands at the top of config.json, or in `rope_parameters` since transformers 5."""
    fields = raw.get("rope_parameters") or {}
    if not isinstance(fields, Mapping):
        raise TorchchatError(f"rope_parameters is {quoted(fields)}; it has to be an object")
    return {**raw, **fields}


def _rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    fields = raw.get(name)
    if not fields:
        return None
    if not isinstance(fields, Mapping):
        raise TorchchatError(f"{name} is {quoted(fields)}; it has to be an object")
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind == "default":
        return None
    context = raw.get("max_position_embeddings")
    original = fields.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=_number(fields, "factor"), original_context=original or context)
    if kind == "dynamic":
        if fields.get("alpha") is not None:
            raise TorchchatError(f"rope scaling 'dynamic' has alpha {quoted(fields['alpha'])}; torchchat supports only "
                                 "factor")
        return RopeScaling(kind=kind, factor=_number(fields, "factor"), original_context=context)
    if kind == "llama3":
        return RopeScaling(
            kind=kind, factor=_number(fields, "factor"),
            low_frequency_factor=_number(fields, "low_freq_factor"),
            high_frequency_factor=_number(fields, "high_freq_factor"),
            original_context=_required(fields, "original_max_position_embeddings"),
        )
    if kind == "yarn":
        return RopeScaling(
            kind=kind, factor=_number(fields, "factor"), original_context=original or context,
            beta_fast=_number(fields, "beta_fast", 32.0), beta_slow=_number(fields, "beta_slow", 1.0),
            truncate=_boolean(fields, "truncate", True),
            attention_factor=_optional_number(fields, "attention_factor"),
            mscale=_optional_number(fields, "mscale"), mscale_all_dim=_optional_number(fields, "mscale_all_dim"),
        )
    if kind == "longrope":
        original = original or context
        _check_size("original_max_position_embeddings", original, MAXIMUM_SIZE, minimum=2)
        factor = _optional_number(fields, "factor")
        if factor is None:
            factor = context / original if context and original else 1.0
        return RopeScaling(
            kind=kind, factor=factor, original_context=original,
            attention_factor=_optional_number(fields, "attention_factor"),
            short_factor=_numbers(fields, "short_factor"), long_factor=_numbers(fields, "long_factor"),
        )
    raise TorchchatError(f"unknown rope scaling {quoted(kind)}; known are linear, dynamic, llama3, yarn and longrope")


def _required(raw: Mapping[str, Any], name: str) -> Any:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TorchchatError(f"{name} is {quoted(value)} in the config; it has to be a whole number")
    return value


def _boolean(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = raw.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TorchchatError(f"{name} is {quoted(value)} in the config; it has to be true or false")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name, default)
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # raised for an integer with hundreds of digits
            if math.isfinite(number := float(value)):
                return number
    raise TorchchatError(f"{name} is {quoted(value)} in the config; it has to be a number")


def _optional_number(raw: Mapping[str, Any], name: str) -> float | None:
    return None if raw.get(name) is None else _number(raw, name)


def _numbers(raw: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = raw.get(name)
    if not isinstance(values, list):
        raise TorchchatError(f"{name} is {quoted(values)} in the config's rope_scaling; it has to be a list of numbers")
    return tuple(_number({name: value}, name) for value in values)


# ---- Meta's params.json and llama2.c's model_args -----------------------------------------------------------------


def config_from_meta(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """`ModelConfig` from Meta's params.json or the `model_args` inside a llama2.c .pt file.

    `shapes` are the shapes of the checkpoint's tensors by canonical name: the vocabulary and the hidden layer of
    the feed-forward are read there, since params.json gives neither (vocab_size is -1 for Llama 2).
    """
    if params.get("moe"):
        raise TorchchatError("params.json describes a mixture of experts, which torchchat's transformer does not have")
    embedding = _shape(shapes, "model.embed_tokens.weight")
    gate = _shape(shapes, "model.layers.0.mlp.gate_proj.weight")
    dim = _required(params, "dim")
    heads = _required(params, "n_heads")
    scaled = bool(params.get("use_scaled_rope"))
    return ModelConfig(
        architecture="llama",
        vocab_size=embedding[0],
        hidden_size=dim,
        intermediate_size=gate[0],
        num_layers=_required(params, "n_layers"),
        num_heads=heads,
        num_kv_heads=params.get("n_kv_heads") or heads,
        head_dim=params.get("head_dim") or dim // max(heads, 1),
        max_context=params.get("max_seq_len") or (131072 if scaled else _meta_context(embedding[0])),
        norm_eps=_number(params, "norm_eps", 1e-5),
        rope_theta=_number(params, "rope_theta", 10000.0),
        rope_scaling=_meta_rope_scaling(params) if scaled else None,
        rope_interleaved=True,
        sliding_window=params.get("sliding_window"),
        tied_embeddings="lm_head.weight" not in shapes,
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != 2:
        raise TorchchatError(f"the checkpoint has no matrix {quoted(name)}, from which its sizes are read")
    return shape


def _meta_context(vocab_size: int) -> int:
    """Meta's files do not state the context: Llama 3 (128 256 tokens) has 8192 positions, Llama 2 has 4096."""
    return 8192 if vocab_size >= 128_000 else 4096


def _meta_rope_scaling(params: Mapping[str, Any]) -> RopeScaling:
    """params.json only says that RoPE is scaled. Llama 3.1 has factor 8; 3.2's 1B and 3B (dim below 4096) have 32."""
    factor = _number(params, "rope_scaling_factor", 8.0 if params["dim"] >= 4096 else 32.0)
    return RopeScaling(kind="llama3", factor=factor, original_context=8192,
                       low_frequency_factor=1.0, high_frequency_factor=4.0)
