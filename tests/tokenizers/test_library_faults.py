"""Errors of the tokenizers library, including panics of its Rust code."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from torchchat_core.errors import TorchchatError
from torchchat_core.tokenizers.faults import captured_panics
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader
from torchchat_core.tokenizers.library import takes_exponential_time

BACKTRACKS = "a" * 40 + "!"  # (a+)+$ backtracks more often than the library allows
UNKNOWN_ID = {"type": "TemplateProcessing", "special_tokens": {}, "pair": [
    {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}


def backtracking() -> tokenizers.Tokenizer:
    """A byte tokenizer that first splits a text by `(a+)+$`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("(a+)+$"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(**changes: Any) -> Path:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(backtracking().to_str()), **changes}), "utf-8")
        return path
    return written


def test_a_panic_while_encoding_names_the_file(write: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = write()
    tokenizer = HuggingFaceReader().read(path, {})
    assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat"
    with pytest.raises(TorchchatError) as caught:
        tokenizer.encode(BACKTRACKS)
    assert str(path) in caught.value.message
    assert "retry-limit" in caught.value.message
    assert caught.value.fix
    assert tokenizer.decode(tokenizer.encode("a dog")) == "a dog"
    assert capfd.readouterr().err == ""  # the library wrote "thread ... panicked" there


@pytest.mark.parametrize("changes", [
    {"post_processor": UNKNOWN_ID},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAA=="}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"model": {"type": "BPE", "continuing_subword_prefix": "\u00e9", "merges": ["a a"], "vocab": {"a": 0, "aa": 1}}},
    {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
               "max_input_chars_per_word": 100, "vocab": {"b": 0}}},
], ids=["template", "charsmap", "empty charsmap", "fixed length", "merges", "no unknown token"])
def test_a_file_that_crashes_the_library_is_named(
        write: Callable[..., Path], capfd: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    path = write(**changes)
    with pytest.raises(TorchchatError) as caught:
        HuggingFaceReader().read(path, {})
    assert str(path) in caught.value.message
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 100_000}},
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 300}] * 2}},
    {"decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}},
], ids=["a long text for nothing", "forty times two letters", "long prefixes", "decoder"])
def test_a_file_whose_replacements_fill_the_memory_is_refused(write: Callable[..., Path], changes: dict[str, Any]
                                                              ) -> None:
    path = write(**changes)
    with pytest.raises(TorchchatError, match="times as long") as caught:
        HuggingFaceReader().read(path, {})
    assert str(path) in caught.value.message


def test_a_table_that_says_it_is_larger_than_it_is_is_refused(write: Callable[..., Path]) -> None:
    path = write(normalizer={"type": "Precompiled", "precompiled_charsmap": "/" * 800})  # 4 GiB
    with pytest.raises(TorchchatError, match="shorter than it says") as caught:
        HuggingFaceReader().read(path, {})
    assert str(path) in caught.value.message


def test_a_step_of_a_wrong_type_is_no_crash(write: Callable[..., Path]) -> None:
    path = write(normalizer={"type": "Sequence", "normalizers": [{"type": {"type": "x"}, "prepend": "a"}]})
    with contextlib.suppress(TorchchatError):  # the library may take it for what its fields say
        assert HuggingFaceReader().read(path, {}).encode("b")


def test_other_output_during_panic_capture_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_panics():
        os.write(2, b"warning: of another thread\n")
        os.write(2, b"\nthread '<unnamed>' (12) panicked at x.rs:1:2:\nwords\nstack backtrace:\n   0: f\n")
    assert capfd.readouterr().err == "warning: of another thread\n"


@pytest.mark.parametrize(("pattern", "exponential"), [
    ("(a|a)*$", True), ("^(a|aa)+$", True), ("(a{1,9}){1,99}$", True), ("(a?b?)+$", True), (r"(\w|a){2,}", True),
    ("(?i:a|b)+", True),
    (r"(?=(\d{3})+(?!\d))", False), (r"(?i)(?:\p{N}{3})+", False), ("(?<name>a|b)?", False), ("(a|b){0,1}", False),
    (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s*[\r\n]+", False), ("(a|b){3}", True),
    ("(a+)+$", True), ("(?:a|b*)+", True), ("(a+){2,}", True), (r"((?:\s+|x)y*)*", True),
    (r"'s| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+", False), (r"[(+)]+", False), (r"\(a+\)+", False),
    ("(?i:'s|'t)?a+", False), ("(a+)?b+", False), ("(ab)+", False), ("(a+", False),
])
def test_patterns_that_may_take_exponential_time_are_detected(pattern: str, exponential: bool) -> None:
    assert takes_exponential_time(pattern) is exponential
