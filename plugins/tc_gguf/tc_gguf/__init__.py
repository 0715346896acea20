"""GGUF, the file format of llama.cpp: models with their configuration, tokenizer and chat template in one file."""

from __future__ import annotations

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ModelSourceInfo

__version__ = "0.1.0"


@hookimpl
def torchchat_model_sources() -> list[ModelSourceInfo]:
    return [ModelSourceInfo(
        name="gguf",
        summary="GGUF files, versions 2 and 3, quantised or not",
        factory="tc_gguf.checkpoint:GgufSource",
        formats=frozenset({"gguf"}),
    )]
