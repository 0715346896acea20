"""GGUF, the file format of llama.cpp: models with their configuration, tokenizer and chat template in one file."""

from __future__ import annotations

from tc_gguf.options import GgufOptions
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import DTYPES, ExporterInfo, ModelSourceInfo, TokenizerInfo

__version__ = "0.1.0"


@hookimpl
def torchchat_model_sources() -> list[ModelSourceInfo]:
    return [ModelSourceInfo(
        name="gguf",
        summary="GGUF files, versions 2 and 3, quantised or not",
        factory="tc_gguf.checkpoint:GgufSource",
        formats=frozenset({"gguf"}),
    )]


@hookimpl
def torchchat_tokenizers() -> list[TokenizerInfo]:
    return [TokenizerInfo(
        name="gguf",
        summary="tokenizers inside GGUF files",
        factory="tc_gguf.reader:GgufTokenizerReader",
        files=("*.gguf",),
        order=5,
    )]


@hookimpl
def torchchat_exporters() -> list[ExporterInfo]:
    return [ExporterInfo(
        name="gguf",
        summary="a GGUF file, which llama.cpp and others run",
        factory="tc_gguf.exporter:GgufExporter",
        options=GgufOptions,
        writes="gguf",
        suffix=".gguf",
        devices=frozenset({"cpu"}),
        dtypes=frozenset(DTYPES),
        flag="--output-gguf-path",
    )]
