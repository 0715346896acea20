"""Finding the tokenizer among a model's files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.plugins import Registry
from torchchat_core.specs import ModelFiles, TokenizerInfo
from torchchat_core.tokenizers.hugging_face import HuggingFaceTokenizer
from torchchat_core.tokenizers.loading import read_tokenizer
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceTokenizer
from torchchat_core.tokenizers.tiktoken_file import TiktokenTokenizer

Files = Callable[..., ModelFiles]


class FaultyReader:
    """Accepts everything and fails in a way of its own."""

    def accepts(self, _path: Path) -> bool:
        return True

    def read(self, _path: Path, _settings: object) -> object:
        raise KeyError("vocab")


def test_tokenizer_model_is_told_apart_by_its_content(testdata: Path, registry: Registry, model_files: Files) -> None:
    llama2 = read_tokenizer(model_files(testdata / "tokenizers/llama2/tokenizer.model"), registry)
    llama3 = read_tokenizer(model_files(testdata / "tokenizers/llama3/tokenizer.model"), registry)
    assert isinstance(llama2, SentencePieceTokenizer)
    assert isinstance(llama3, TiktokenTokenizer)


def test_of_several_files_the_reader_of_lowest_order_takes_its_own(testdata: Path, registry: Registry,
                                                                   model_files: Files) -> None:
    files = model_files(testdata / "hf/TinyStories-656K/tokenizer.json", testdata / "tokenizers/llama2/tokenizer.model")
    assert isinstance(read_tokenizer(files, registry), HuggingFaceTokenizer)


def test_no_tokenizer_says_what_was_looked_for(registry: Registry, model_files: Files) -> None:
    with pytest.raises(TorchchatError, match=r"no tokenizer; looked for tokenizer\.json, tokenizer\.model") as caught:
        read_tokenizer(model_files(), registry)
    assert "--tokenizer-path" in (caught.value.fix or "")


def test_a_file_of_no_known_kind_is_named(registry: Registry, model_files: Files, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x00\x01\x02 this is no tokenizer")
    with pytest.raises(TorchchatError, match=r"tokenizer\.model is damaged, or of no kind") as caught:
        read_tokenizer(model_files(path), registry)
    assert "--tokenizer-path" in (caught.value.fix or "")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n",
                                                                     "Git LFS pointer")])
def test_empty_files_and_pointers_are_named(name: str, content: bytes, message: str, registry: Registry,
                                            model_files: Files, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TorchchatError, match=message):
        read_tokenizer(model_files(path), registry)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_missing_files_and_folders_are_named(name: str, registry: Registry, model_files: Files, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(TorchchatError, match=f"{name} cannot be read"):
        read_tokenizer(model_files(path), registry)
    path.mkdir()
    with pytest.raises(TorchchatError, match=f"{name} cannot be read"):
        read_tokenizer(model_files(path), registry)


@pytest.mark.parametrize("settings", ["{", "[]", "", "\x00"])
def test_a_damaged_tokenizer_config_is_refused(settings: str, testdata: Path, registry: Registry, model_files: Files,
                                               tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((testdata / "tinyllamas/stories260K/tok512.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(settings, "utf-8")
    with pytest.raises(TorchchatError, match="tokenizer_config"):
        read_tokenizer(model_files(path), registry)


def test_a_huge_token_id_costs_no_memory(registry: Registry, model_files: Files, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "WordLevel", "unk_token": "<unk>",
                                                            "vocab": {"<unk>": 0, "a": 4_000_000_000}}}), "utf-8")
    assert read_tokenizer(model_files(path), registry).vocab_size == 4_000_000_001


def test_any_other_fault_of_a_reader_becomes_an_error_that_names_it(model_files: Files, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def torchchat_tokenizers() -> list[TokenizerInfo]:
        return [TokenizerInfo(name="faulty", summary="fails", factory="faulty_reader:FaultyReader", files=("*.vocab",))]

    plugin = ModuleType("faulty_reader")
    vars(plugin).update(torchchat_tokenizers=torchchat_tokenizers, FaultyReader=FaultyReader)
    monkeypatch.setitem(sys.modules, "faulty_reader", plugin)
    registry = Registry()
    registry.add(plugin, "faulty", "tc-faulty")
    (tmp_path / "a.vocab").write_text("x", "utf-8")
    with pytest.raises(TorchchatError, match=r"a\.vocab cannot be read as a faulty tokenizer: KeyError: 'vocab'"):
        read_tokenizer(model_files(tmp_path / "a.vocab"), registry)
