"""Detect and reject checkpoints that other programs quantized (FP8, GPTQ, AWQ, bitsandbytes, MLX, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchchat_core.errors import TorchchatError, quoted

OWN = "torchchat"
UNNAMED = "an unnamed method"
FETCH_ANOTHER = "use the unquantized model and add --quantize, or use a GGUF file of the model"
# Methods as their authors spell them; other methods appear as in config.json.
_NAMES = {"fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "mlx": "MLX", "hqq": "HQQ", "aqlm": "AQLM",
          "eetq": "EETQ", "vptq": "VPTQ", "spqr": "SpQR", "fbgemm_fp8": "FBGEMM FP8", "modelopt": "ModelOpt",
          "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "unnamed": UNNAMED}


def quantization_method(raw: Mapping[str, Any]) -> str | None:
    """Return the method with which another program quantized the weights according to config.json, or None.

    transformers and vLLM state `quantization_config.quant_method`, early compressed-tensors `compression_config`,
    and MLX an object `quantization` (and the same as `quantization_config`) with `group_size` and `bits`.
    """
    for key, usual in (("quantization_config", None), ("compression_config", "compressed-tensors"),
                       ("quantization", "MLX")):
        stated = raw.get(key)
        if not stated:
            continue
        method = stated.get("quant_method") if isinstance(stated, Mapping) else None
        if method == OWN:
            return None
        if isinstance(method, str):
            return _NAMES.get(method, method)
        if usual is None and isinstance(stated, Mapping) and {"group_size", "bits"} <= stated.keys():
            return "MLX"
        return usual or UNNAMED
    return None


def refuse_foreign_weights(method: str, file: str, stored: Mapping[str, tuple[int, ...]],
                           wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `TorchchatError` if config.json names a quantization `method` and the tensors are not plain weights.

    `stored` and `wanted` are the shapes of the tensors in the file and of the model's weights. Some programs dequantize
    the weights but leave the entry in config.json; such files are accepted.
    """
    if stored.keys() <= wanted.keys() | {"lm_head.weight"} and all(
            wanted.get(name, shape) == shape for name, shape in stored.items()):
        return
    shown = method if method in _NAMES.values() else quoted(method)
    raise TorchchatError(f"config.json says that the weights in {file} were quantized with {shown}; torchchat cannot "
                         "read them", FETCH_ANOTHER)
