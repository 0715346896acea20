"""The options of the exporter, which are read before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from torchchat_core.options import option

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """How weights are stored."""

    gguf_type: str = option("auto", "type of the matrices in a GGUF file; auto: what the model has",
                            choices=("auto", *GGUF_TYPES))
