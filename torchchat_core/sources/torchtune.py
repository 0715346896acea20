"""torchtune's own checkpoints: what it calls the tensors, and the models behind the names of its builders.

Facts from https://github.com/pytorch/torchtune, torchtune/models. The rotary pairs are Meta's (interleaved), except
for Qwen, whose weights torchtune leaves as they are.
"""

from __future__ import annotations

from typing import Any

from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.models.config import ModelConfig, RopeScaling

_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def canonical_name(name: str) -> str:
    """The canonical name of a tensor that torchtune calls `name`; an unknown name stays as it is."""
    stem, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "layers" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{kind}"
    return name


def named_config(name: str) -> ModelConfig:
    """The model that a builder of torchtune makes: "llama3_1_8b"; capitals, points and dashes do not matter.

    Raises `TorchchatError` for a name that is not known, with near matches.
    """
    known = _BUILDERS.get(name.lower().replace(".", "_").replace("-", "_"))
    if known is None:
        raise TorchchatError(f"no model of torchtune that torchchat knows is called {quoted(name)}",
                             did_you_mean(name, _BUILDERS) or f"known are {', '.join(_BUILDERS)}")
    return known


def _model(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    return ModelConfig(**{
        "architecture": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers,
        "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": hidden // heads, "norm_eps": 1e-5, **more})


_LLAMA2 = {"vocab_size": 32000, "max_context": 4096}
_CODE_LLAMA = {"vocab_size": 32016, "max_context": 16384, "rope_theta": 1e6}
_LLAMA3 = {"vocab_size": 128256, "max_context": 8192, "rope_theta": 5e5}
_LLAMA31 = {**_LLAMA3, "max_context": 131072,
            "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=8192)}
_LLAMA32 = {**_LLAMA31, "rope_scaling": RopeScaling(kind="llama3", factor=32.0, original_context=8192),
            "tied_embeddings": True}
_QWEN2 = {"architecture": "qwen2", "vocab_size": 151936, "max_context": 32768, "rope_theta": 1e6, "norm_eps": 1e-6,
          "attention_bias": True}

_BUILDERS = {
    "llama2_7b": _model(4096, 11008, 32, 32, 32, **_LLAMA2),
    "llama2_13b": _model(5120, 13824, 40, 40, 40, **_LLAMA2),
    "llama2_70b": _model(8192, 28672, 80, 64, 8, **_LLAMA2),
    "code_llama2_7b": _model(4096, 11008, 32, 32, 32, **_CODE_LLAMA),
    "code_llama2_13b": _model(5120, 13824, 40, 40, 40, **_CODE_LLAMA),
    "code_llama2_70b": _model(8192, 28672, 80, 64, 8, **_CODE_LLAMA),
    "llama3_8b": _model(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama3_70b": _model(8192, 28672, 80, 64, 8, **_LLAMA3),
    "llama3_1_8b": _model(4096, 14336, 32, 32, 8, **_LLAMA31),
    "llama3_1_70b": _model(8192, 28672, 80, 64, 8, **_LLAMA31),
    "llama3_1_405b": _model(16384, 53248, 126, 128, 8, **_LLAMA31),
    "llama3_2_1b": _model(2048, 8192, 16, 32, 8, **_LLAMA32),
    "llama3_2_3b": _model(3072, 8192, 28, 24, 8, **_LLAMA32),
    "llama3_3_70b": _model(8192, 28672, 80, 64, 8, **_LLAMA31),
    "mistral_7b": _model(4096, 14336, 32, 32, 8, architecture="mistral", vocab_size=32000, max_context=32768),
    "qwen2_0_5b": _model(896, 4864, 24, 14, 2, **_QWEN2, tied_embeddings=True),
    "qwen2_1_5b": _model(1536, 8960, 28, 12, 2, **_QWEN2, tied_embeddings=True),
    "qwen2_7b": _model(3584, 18944, 28, 28, 4, **{**_QWEN2, "vocab_size": 152064}),
}
