"""The plugin passes the contracts for what it offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tc_gguf.exporter import GgufExporter
from tc_gguf.reader import GgufTokenizerReader
from torchchat_core.specs import ExportRequest, Tokenizer
from torchchat_core.testing import ExporterContract, ModelSourceContract, PluginContract, TokenizerContract
from torchchat_core.testing.models import seeded, tiny_config


class TestPlugin(PluginContract):
    plugin = "tc_gguf"


class TestSource(ModelSourceContract):
    plugin, name = "tc_gguf", "gguf"

    @pytest.fixture
    def references(self, tmp_path: Path) -> Sequence[str]:
        path = tmp_path / "tiny.gguf"
        GgufExporter().export(ExportRequest(module=seeded(tiny_config()), path=path, device="cpu", dtype="fp32"))
        return [str(path)]


class TestExporter(ExporterContract):
    """All but a sliding window in some layers, for which GGUF files of these architectures have no words."""

    plugin, name = "tc_gguf", "gguf"
    executor_plugin = "tc_eager"
    variants = ("llama", "multi-head", "multi-query", "tied", "biases", "qk-norm", "sliding-window",
                "interleaved-rope", "scaled-rope", "longrope", "multipliers", "odd-sizes")


class TestSentencePiece(TokenizerContract):
    """SentencePiece writes spaces as U+2581, and cannot tell one that was there before."""

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, testdata: Path) -> Tokenizer:
        return GgufTokenizerReader().read(testdata / "gguf-vocab/ggml-vocab-llama-spm.gguf", {})

    def normalised(self, text: str) -> str:
        return text.replace("\u2581", " ")


class TestByteLevel(TokenizerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, testdata: Path) -> Tokenizer:
        return GgufTokenizerReader().read(testdata / "gguf-vocab/ggml-vocab-gpt-2.gguf", {})
