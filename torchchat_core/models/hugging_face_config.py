"""`ModelConfig` as Hugging Face writes it: the inverse of `config.config_from_hugging_face`."""

from __future__ import annotations

import dataclasses
from typing import Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig, RopeScaling, config_from_hugging_face

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
DEFAULT_LLAMA3_CONTEXT = 8192  # what rotary.py takes where nothing is said


def config_to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json that describes the same model, its rotary pairs in Hugging Face's order.

    The architecture is the model's own or, where Hugging Face's class of that name lacks something that the model
    has (a Llama with a sliding window), the first that has it. `rope_interleaved` has no place in config.json: the
    weights are reordered instead (`rope_layout`). Raises `TorchchatError` where no class describes the model.
    """
    wanted = _comparable(config)
    for architecture in dict.fromkeys((config.architecture, *CLASSES)):
        if architecture in CLASSES:
            written = _written(config, architecture)
            if _comparable(config_from_hugging_face(written)) == wanted:
                return written
    raise TorchchatError(f"no model class of Hugging Face ({', '.join(CLASSES)}) describes this "
                         f"{quoted(config.architecture)} model")


def _comparable(config: ModelConfig) -> ModelConfig:
    """Equal for two configurations of the same computation, apart from the order of the rotary pairs."""
    windows = tuple(config.layer_window(layer) for layer in range(config.num_layers))
    everywhere = None not in windows
    somewhere = any(window is not None for window in windows)
    return dataclasses.replace(
        config, architecture="any", rope_interleaved=False, attention_multiplier=config.attention_scale,
        sliding_window=config.sliding_window if somewhere else None,
        sliding_layers=None if everywhere or not somewhere else config.sliding_layers,
        rope_scaling=_with_context(config.rope_scaling, config),
    )


def _with_context(scaling: RopeScaling | None, config: ModelConfig) -> RopeScaling | None:
    if scaling is None or scaling.original_context is not None:
        return scaling
    context = DEFAULT_LLAMA3_CONTEXT if scaling.kind == "llama3" else config.max_context
    if scaling.kind == "linear":
        context = max(2, int(context / max(scaling.factor, 1.0)))
    return dataclasses.replace(scaling, original_context=context)


def _written(config: ModelConfig, architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _stated_context(config),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(_with_context(config.rope_scaling, config)),
        "tie_word_embeddings": config.tied_embeddings,
    }
    return {**fields, **_OWN_FIELDS[architecture](config)}


def _stated_context(config: ModelConfig) -> int:
    """Return `max_position_embeddings`: with dynamic scaling, the original context, as Hugging Face defines it."""
    scaling = config.rope_scaling
    original = scaling.original_context if scaling is not None and scaling.kind == "dynamic" else None
    return original or config.max_context


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "dynamic":
        return {"rope_type": scaling.kind, "factor": scaling.factor}
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor,
                              "original_max_position_embeddings": scaling.original_context}
    if scaling.kind == "linear":
        return fields
    if scaling.kind == "llama3":
        return {**fields, "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor}
    optional = {name: value for name in ("attention_factor", "mscale", "mscale_all_dim")
                if (value := getattr(scaling, name)) is not None}
    if scaling.kind == "longrope":
        return {**fields, **optional, "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor)}
    return {**fields, **optional, "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate}


# ---- what each class has of its own: a field that it lacks is left out, and found missing by the comparison -------


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_output_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _qwen2(config: ModelConfig) -> dict[str, Any]:
    windows = [config.layer_window(layer) for layer in range(config.num_layers)]
    if not any(windows):
        return {"use_sliding_window": False}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds,
            "max_window_layers": kinds.index("sliding_attention")}


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_output_bias, **_qwen2(config)}


def _granite(config: ModelConfig) -> dict[str, Any]:
    return {**_llama(config), "embedding_multiplier": config.embedding_multiplier,
            "attention_multiplier": config.attention_scale, "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logits_divisor}


_OWN_FIELDS = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "granite": _granite}
