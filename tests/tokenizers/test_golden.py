"""Every tokenizer gives the ids and texts that its own library gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core.specs import Tokenizer

GOLDEN = ["tokenizers/llama2/tokenizer.model", "tinyllamas/stories260K/tok512.model",
          "tokenizers/mistral-v3/tokenizer.model", "tokenizers/llama3/tokenizer.model",
          "hf/TinyStories-656K/tokenizer.json", "tokenizers/phi-2/tokenizer.json"]
Real = Callable[[str], Tokenizer]


def golden(testdata: Path) -> dict:
    return json.loads((testdata / "golden/tokenizers.json").read_text("utf-8"))


def test_all_golden_tokenizers_are_covered(testdata: Path) -> None:
    assert sorted(golden(testdata)["encodings"]) == sorted(GOLDEN)


@pytest.mark.parametrize("path", GOLDEN)
def test_encoding_matches_the_golden_ids(path: str, testdata: Path, real: Real) -> None:
    vectors = golden(testdata)
    for text, ids in zip(vectors["strings"], vectors["encodings"][path]["ids"], strict=True):
        assert real(path).encode(text) == ids, text


@pytest.mark.parametrize("path", GOLDEN)
def test_decoding_matches_the_golden_texts(path: str, testdata: Path, real: Real) -> None:
    vectors = golden(testdata)
    encoding = vectors["encodings"][path]
    for ids, text in zip(encoding["ids"], encoding.get("decoded", vectors["strings"]), strict=True):
        assert real(path).decode(ids) == text


@pytest.mark.parametrize(("name", "path"), [("llama-bpe", "tokenizers/llama3/tokenizer.model"),
                                            ("llama-spm", "tokenizers/llama2/tokenizer.model")])
def test_encoding_matches_the_vectors_of_llama_cpp(name: str, path: str, testdata: Path, real: Real) -> None:
    for text, ids in llama_cpp_vectors(testdata, name):
        assert real(path).encode(text) == ids, text


def test_encoding_matches_gpt2_where_phi_adds_nothing(testdata: Path, tmp_path: Path,
                                                      read: Callable[[Path], Tokenizer]) -> None:
    """phi-2 has GPT-2's vocabulary, and further tokens for white space, which are left out here."""
    content = json.loads((testdata / "tokenizers/phi-2/tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokenizer = read(tmp_path / "tokenizer.json")
    for text, ids in llama_cpp_vectors(testdata, "gpt-2"):
        assert tokenizer.encode(text) == ids, text


def llama_cpp_vectors(testdata: Path, name: str) -> list[tuple[str, list[int]]]:
    texts = (testdata / f"gguf-vocab/ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (testdata / f"gguf-vocab/ggml-vocab-{name}.gguf.out").read_text("utf-8").splitlines()
    assert (len(lines), texts.pop()) == (len(texts), "")  # a separator stands after the last case
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize(("path", "bos", "eos", "adds_bos", "adds_prefix_space", "vocab_size"), [
    ("tokenizers/llama2/tokenizer.model", 1, 2, True, True, 32000),
    ("tinyllamas/stories260K/tok512.model", 1, 2, True, True, 512),
    ("tokenizers/mistral-v3/tokenizer.model", 1, 2, True, True, 32768),
    ("tokenizers/llama3/tokenizer.model", 128000, 128001, True, False, 128256),
    ("hf/TinyStories-656K/tokenizer.json", 1, 2, True, True, 2048),
    ("tokenizers/phi-2/tokenizer.json", 50256, 50256, False, False, 50295),
])
def test_properties_of_real_tokenizers(path: str, bos: int, eos: int, adds_bos: bool, adds_prefix_space: bool,
                                       vocab_size: int, real: Real) -> None:
    tokenizer = real(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    assert (tokenizer.adds_bos, tokenizer.adds_prefix_space) == (adds_bos, adds_prefix_space)
    assert tokenizer.vocab_size == vocab_size


@pytest.mark.parametrize("path", GOLDEN)
def test_control_tokens_are_found_only_when_asked_for_and_never_shown(path: str, real: Real) -> None:
    tokenizer = real(path)
    for text, token in list(tokenizer.special_tokens.items())[:20]:
        written = f"one {text}two"
        assert token not in tokenizer.encode(written)
        assert tokenizer.decode(tokenizer.encode(written)) == written
        assert tokenizer.encode(written, special=True).count(token) == 1
        assert tokenizer.encode(text, special=True) == [token]
        assert tokenizer.decode([token]) == ""
        assert tokenizer.token_bytes(token) == text.encode()


@pytest.mark.parametrize("path", GOLDEN)
def test_lone_surrogates_become_replacement_characters(path: str, real: Real) -> None:
    tokenizer = real(path)
    assert tokenizer.encode("a\ud800b\ud83d\ude00") == tokenizer.encode("a\ufffdb\N{GRINNING FACE}")
