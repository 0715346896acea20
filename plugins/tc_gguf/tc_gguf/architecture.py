"""What a model is called in a GGUF file, and the metadata that describe it: the other direction of `config`.

Keys and their meaning are those of llama.cpp (gguf-py/gguf/constants.py, llama-model.cpp). What its graph for an
architecture does not have is refused, so that no file says another thing there than here, with one exception: the
sliding window of `llama`, which its converter writes and its graph leaves alone. The exporter warns of that.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from torch import Tensor

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig, RopeScaling
from torchchat_core.models.rotary import rotary_amplitude, rotary_frequencies

HALF_SPLIT = frozenset({"qwen2", "qwen3"})  # architectures whose rotary pairs are i and i + head_dim / 2
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}


def architecture_of(config: ModelConfig) -> str:
    """The architecture of llama.cpp whose graph is that of the model.

    Raises `TorchchatError` where there is none.
    """
    scaled = (config.embedding_multiplier, config.residual_multiplier, config.logits_divisor) != (1.0, 1.0, 1.0) \
        or config.attention_multiplier is not None
    biased = config.attention_bias or config.attention_output_bias or config.mlp_bias
    if config.sliding_layers is not None:
        raise _impossible("a sliding window in some of its layers")
    if config.qk_norm:
        if scaled or biased:
            raise _impossible("query-key norms together with biases or Granite's multipliers")
        name = "qwen3"
    elif scaled or config.architecture == "granite":
        name = "granite"
    else:
        name = "qwen2" if config.architecture == "qwen2" else "llama"
    if config.sliding_window is not None and name != "llama":
        raise _impossible(f"a sliding window, which the architecture {name} of GGUF files does not have")
    return name


def _impossible(what: str) -> TorchchatError:
    return TorchchatError(f"the model has {what}; no architecture that is written to GGUF files has that")


def tensor_name(name: str) -> str:
    """The name in GGUF files of the tensor with a canonical name. Raises `TorchchatError` for an unknown one."""
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in LAYER_NAMES:
        return f"blk.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    if name in NAMES:
        return NAMES[name]
    raise TorchchatError(f"the tensor {quoted(name)} has no name in GGUF files", "export the model without --quantize")


def metadata_of(config: ModelConfig, architecture: str) -> Mapping[str, int | float | str]:
    """What describes the model, by key. Raises `TorchchatError` for rotary scaling that cannot be described."""
    own: dict[str, int | float | str] = {
        "vocab_size": config.vocab_size, "context_length": config.max_context, "embedding_length": config.hidden_size,
        "block_count": config.num_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim, "rope.freq_base": config.rope_theta,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        own |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.sliding_window is not None:
        own["attention.sliding_window"] = config.sliding_window
    if architecture == "granite":
        own |= {"embedding_scale": config.embedding_multiplier, "residual_scale": config.residual_multiplier,
                "logit_scale": config.logits_divisor, "attention.scale": config.attention_scale}
    if config.rope_scaling is not None:
        own |= _scaling(config.rope_scaling, config.max_context)
    return {f"{architecture}.{key}": value for key, value in own.items()}


def _scaling(scaling: RopeScaling, context: int) -> dict[str, int | float | str]:
    """The keys for rotary scaling; llama3 has none, as its factors are a tensor."""
    if scaling.kind == "llama3":
        return {}
    if scaling.kind == "dynamic":
        raise _impossible("dynamic NTK rope scaling, whose frequencies change with the length of the sequence")
    keys: dict[str, int | float | str] = {"rope.scaling.type": scaling.kind}
    if scaling.kind == "linear":  # the reader multiplies the original context by the factor
        original = scaling.original_context or max(2, int(context / max(scaling.factor, 1.0)))
        return keys | {"rope.scaling.factor": scaling.factor, "rope.scaling.original_context_length": original}
    keys["rope.scaling.original_context_length"] = scaling.original_context or context
    amplitude = rotary_amplitude(scaling)
    if scaling.kind == "yarn":
        if not scaling.truncate:
            raise _impossible("YaRN whose correction range is not rounded (\"truncate\": false)")
        keys |= {"rope.scaling.factor": scaling.factor, "rope.scaling.yarn_beta_fast": scaling.beta_fast,
                 "rope.scaling.yarn_beta_slow": scaling.beta_slow}
        amplitude /= 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0  # which llama.cpp multiplies by itself
    return keys if math.isclose(amplitude, 1.0) else keys | {"rope.scaling.attn_factor": amplitude}


def factor_tensors(config: ModelConfig, architecture: str) -> Mapping[str, Tensor]:
    """Tables [head_dim / 2] float32 that rotary frequencies are divided by, where the scaling is written as such."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    if architecture in HALF_SPLIT:
        raise _impossible(f"{scaling.kind} scaling, which the architecture {architecture} of GGUF files does not have")
    plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None), extended=False)
    short, long = (plain / rotary_frequencies(config, extended=extended) for extended in (False, True))
    if scaling.kind == "llama3":
        return {"rope_freqs.weight": short}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
