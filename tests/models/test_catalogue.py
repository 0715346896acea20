"""The catalogue: the names that were promised, and sizes that follow from what the models are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from torchchat_core.models.catalogue import load_catalogue
from torchchat_core.models.config import config_from_hugging_face
from torchchat_core.models.transformer import Transformer
from torchchat_core.testing.plugin_contract import ALIAS

ENTRIES = {entry.alias: entry for entry in load_catalogue()}
ORIGINAL = {
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct", "llama3-base": "meta-llama/Meta-Llama-3-8B",
    "llama2": "meta-llama/Llama-2-7b-chat-hf", "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama2-70b-chat": "meta-llama/Llama-2-70b-chat-hf", "llama2-base": "meta-llama/Llama-2-7b-hf",
    "codellama": "meta-llama/CodeLlama-7b-Python-hf", "codellama-34b": "meta-llama/CodeLlama-34b-Python-hf",
    "mistral-7b-v01-base": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-v01-instruct": "mistralai/Mistral-7B-Instruct-v0.1", "mistral": "mistralai/Mistral-7B-Instruct-v0.2",
    "stories15M": "karpathy/tinyllamas:stories15M.pt", "stories42M": "karpathy/tinyllamas:stories42M.pt",
    "stories110M": "karpathy/tinyllamas:stories110M.pt", "open-llama": "openlm-research/open_llama_7b",
}


def dimensions(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, kind: str = "llama",
               **more: Any) -> dict[str, Any]:
    """What a model's config.json says of its sizes."""
    return {"model_type": kind, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 2048, **more}


TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
LLAMA2_7B = dimensions(32000, 4096, 11008, 32, 32, 32)
LLAMA3_8B = dimensions(128256, 4096, 14336, 32, 32, 8)
LLAMA3_70B = dimensions(128256, 8192, 28672, 80, 64, 8)
MISTRAL = dimensions(32000, 4096, 14336, 32, 32, 8, "mistral")
MISTRAL_V3 = dimensions(32768, 4096, 14336, 32, 32, 8, "mistral")
QWEN2_7B = dimensions(152064, 3584, 18944, 28, 28, 4, "qwen2", **UNTIED)
QWEN2_14B = dimensions(152064, 5120, 13824, 48, 40, 8, "qwen2", **UNTIED)
GRANITE_2B = dimensions(49155, 2048, 8192, 40, 32, 8, "granite", **TIED)
GRANITE_8B = dimensions(49155, 4096, 12800, 40, 32, 8, "granite", **TIED)


def qwen3(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return dimensions(151936, hidden, inner, layers, heads, 8, "qwen3", head_dim=128, **more)


# Names (those that begin so, where they end in *) -> config.json's sizes, and bytes of a stored number. Qwen3's
# smallest store the output layer although it is tied.
SIZES: list[tuple[str, dict[str, Any], int]] = [
    ("llama3", LLAMA3_8B, 2), ("llama3-base", LLAMA3_8B, 2), ("llama3.1-8b*", LLAMA3_8B, 2),
    ("llama3.1-70b*", LLAMA3_70B, 2), ("llama3.3-70b", LLAMA3_70B, 2),
    ("llama3.2-1b*", dimensions(128256, 2048, 8192, 16, 32, 8, **TIED), 2),
    ("llama3.2-3b*", dimensions(128256, 3072, 8192, 28, 24, 8, **TIED), 2),
    ("llama2", LLAMA2_7B, 2), ("llama2-base", LLAMA2_7B, 2), ("codellama", LLAMA2_7B, 2), ("open-llama", LLAMA2_7B, 2),
    ("llama2-13b-chat", dimensions(32000, 5120, 13824, 40, 40, 40), 2),
    ("llama2-70b-chat", dimensions(32000, 8192, 28672, 80, 64, 8), 2),
    ("codellama-34b", dimensions(32000, 8192, 22016, 48, 64, 8), 2),
    ("mistral", MISTRAL, 2), ("mistral-7b-v01*", MISTRAL, 2), ("mistral-7b-v03*", MISTRAL_V3, 2),
    ("qwen2.5-0.5b*", dimensions(151936, 896, 4864, 24, 14, 2, "qwen2", **TIED), 2),
    ("qwen2.5-1.5b*", dimensions(151936, 1536, 8960, 28, 12, 2, "qwen2", **TIED), 2),
    ("deepseek-r1-qwen-1.5b", dimensions(151936, 1536, 8960, 28, 12, 2, "qwen2", **UNTIED), 2),
    ("qwen2.5-3b*", dimensions(151936, 2048, 11008, 36, 16, 2, "qwen2", **TIED), 2),
    ("qwen2.5-7b*", QWEN2_7B, 2), ("deepseek-r1-qwen-7b", QWEN2_7B, 2),
    ("qwen2.5-14b*", QWEN2_14B, 2), ("deepseek-r1-qwen-14b", QWEN2_14B, 2),
    ("deepseek-r1-qwen-32b", dimensions(152064, 5120, 27648, 64, 40, 8, "qwen2", **UNTIED), 2),
    ("deepseek-r1-llama-8b", LLAMA3_8B, 2), ("deepseek-r1-llama-70b", LLAMA3_70B, 2),
    ("qwen3-0.6b", qwen3(1024, 3072, 28, 16, **UNTIED), 2), ("qwen3-0.6b-base", qwen3(1024, 3072, 28, 16, **TIED), 2),
    ("qwen3-1.7b", qwen3(2048, 6144, 28, 16, **UNTIED), 2), ("qwen3-1.7b-base", qwen3(2048, 6144, 28, 16, **TIED), 2),
    ("qwen3-4b*", qwen3(2560, 9728, 36, 32, **TIED), 2), ("qwen3-8b*", qwen3(4096, 12288, 36, 32, **UNTIED), 2),
    ("qwen3-14b*", qwen3(5120, 17408, 40, 40, **UNTIED), 2),
    ("smollm2-135m*", dimensions(49152, 576, 1536, 30, 9, 3, **TIED), 2),
    ("smollm2-360m*", dimensions(49152, 960, 2560, 32, 15, 5, **TIED), 2),
    ("smollm2-1.7b*", dimensions(49152, 2048, 8192, 24, 32, 32, **TIED), 2),
    ("granite3.1-2b*", GRANITE_2B, 2), ("granite3.2-2b*", GRANITE_2B, 2), ("granite3.3-2b*", GRANITE_2B, 2),
    ("granite3.1-8b*", GRANITE_8B, 2), ("granite3.2-8b*", GRANITE_8B, 2), ("granite3.3-8b*", GRANITE_8B, 2),
    ("granite-code-3b*", dimensions(49152, 2560, 10240, 32, 32, 32, **TIED, **BIASES), 2),
    ("granite-code-8b*", dimensions(49152, 4096, 14336, 36, 32, 8, **TIED, **BIASES), 2),
    ("tinyllama", dimensions(32000, 2048, 5632, 22, 32, 4), 2),
    ("stories15M", dimensions(32000, 288, 768, 6, 6, 6, **TIED), 4),
    ("stories42M", dimensions(32000, 512, 1376, 8, 8, 8, **TIED), 4),
    ("stories110M", dimensions(32000, 768, 2048, 12, 12, 12, **TIED), 4),
]


def names(pattern: str) -> list[str]:
    return [alias for alias in ENTRIES if re.fullmatch(re.escape(pattern).replace(r"\*", "(-base|-instruct)?"), alias)]


@pytest.mark.parametrize(("pattern", "config", "width"), SIZES, ids=[row[0] for row in SIZES])
def test_a_size_is_what_the_models_numbers_take(pattern: str, config: dict[str, Any], width: int) -> None:
    with torch.device("meta"):
        model = Transformer(config_from_hugging_face(config))
    stored = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert names(pattern)
    for alias in names(pattern):
        assert ENTRIES[alias].bytes == sum(stored.values()) * width


def test_every_size_is_checked() -> None:
    checked = [alias for pattern, _, _ in SIZES for alias in names(pattern)]
    assert sorted(checked) == sorted(alias for alias, entry in ENTRIES.items() if entry.bytes is not None)


def test_the_names_of_the_original_mean_the_same_models() -> None:
    assert {alias: ENTRIES[alias].reference for alias in ORIGINAL} == {
        alias: f"hf:{repository}" for alias, repository in ORIGINAL.items()}


@pytest.mark.parametrize("alias", [
    "llama3.1-8b", "llama3.1-8b-base", "llama3.1-70b", "llama3.1-70b-base", "llama3.2-1b", "llama3.2-1b-base",
    "llama3.2-3b", "llama3.2-3b-base", "llama3.3-70b", "llama-guard3-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m",
    "granite3.3-2b", "granite-code-3b", "deepseek-r1-llama-8b", "deepseek-r1-qwen-1.5b", "tinyllama",
    "mistral-7b-v03-instruct"])
def test_the_models_that_came_later_are_there(alias: str) -> None:
    assert alias in ENTRIES


def test_names_are_plain_and_differ_in_more_than_capitals() -> None:
    assert all(ALIAS.fullmatch(alias) for alias in ENTRIES)
    assert len({alias.lower() for alias in ENTRIES}) == len(load_catalogue())


def test_every_entry_names_a_repository_and_a_licence() -> None:
    assert all(re.fullmatch(r"hf:[\w.-]+/[\w.-]+(:[\w.-]+)?", entry.reference) for entry in ENTRIES.values())
    assert all(entry.licence for entry in ENTRIES.values())
    assert len({entry.reference for entry in ENTRIES.values()}) == len(ENTRIES)


def test_metas_models_are_gated() -> None:
    assert all(entry.gated for entry in ENTRIES.values() if entry.reference.startswith("hf:meta-llama/"))


def test_files_of_other_places_come_with_their_digest() -> None:
    files = [file for entry in ENTRIES.values() for file in entry.files if "://" in file]
    assert files
    assert all(re.fullmatch(r"https://.+#sha256=[0-9a-f]{64}", file) for file in files)
