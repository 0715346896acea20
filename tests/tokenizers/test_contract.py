"""The tokenizers pass the contract that every tokenizer has to pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from torchchat_core.specs import Tokenizer
from torchchat_core.testing import TokenizerContract
from torchchat_core.testing.models import TinyTokenizer
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader, byte_level_alphabet

Real = Callable[[str], Tokenizer]


class TestTiny(TokenizerContract):
    @pytest.fixture
    def tokenizer(self) -> Tokenizer:
        return TinyTokenizer()


class TestHuggingFace(TokenizerContract):
    """Made in process: byte-level BPE with some merges and two control tokens."""

    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Tokenizer:
        pieces = [*byte_level_alphabet(), "he", "ll", "hell", "\u0120t"]
        merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("\u0120", "t")]
        library = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens(["<s>", "</s>"])
        library.save(str(tmp_path / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        return HuggingFaceReader().read(tmp_path / "tokenizer.json", settings)


class SentencePieceContract(TokenizerContract):
    """SentencePiece writes spaces as U+2581, and cannot tell one that was there before."""

    def normalised(self, text: str) -> str:
        return text.replace("\u2581", " ")


class TestLlama2(SentencePieceContract):
    @pytest.fixture
    def tokenizer(self, real: Real) -> Tokenizer:
        return real("tokenizers/llama2/tokenizer.model")


class TestMistral(SentencePieceContract):
    @pytest.fixture
    def tokenizer(self, real: Real) -> Tokenizer:
        return real("tokenizers/mistral-v3/tokenizer.model")


class TestLlama3(TokenizerContract):
    @pytest.fixture
    def tokenizer(self, real: Real) -> Tokenizer:
        return real("tokenizers/llama3/tokenizer.model")


class TestPhi2(TokenizerContract):
    @pytest.fixture
    def tokenizer(self, real: Real) -> Tokenizer:
        return real("tokenizers/phi-2/tokenizer.json")


class TestStories(SentencePieceContract):
    """Its file asks for spaces at both ends to be dropped, and for those between to be made one."""

    @pytest.fixture
    def tokenizer(self, real: Real) -> Tokenizer:
        return real("tinyllamas/stories260K/tok512.model")

    def normalised(self, text: str) -> str:
        return re.sub(" +", " ", super().normalised(text)).strip(" ")


class TestTinyStories(TokenizerContract):
    """Its vocabulary has the characters of English stories, and no bytes."""

    texts = ("", " ", "  ", "\n", "Hello, world!", " hello", "it's 3.14159", "a" * 3000, " " * 300)

    @pytest.fixture
    def tokenizer(self, real: Real) -> Tokenizer:
        return real("hf/TinyStories-656K/tokenizer.json")

    def test_control_tokens_come_when_asked_for(self, tokenizer: Tokenizer) -> None:
        """The file has their names normalised like text, and so they are found at the start alone."""
        assert [tokenizer.encode(name, special=True) for name in tokenizer.special_tokens] == [
            [token] for token in tokenizer.special_tokens.values()]
