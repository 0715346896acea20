"""Long texts are encoded in slices, with the same ids as in one piece."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from torchchat_core.errors import TorchchatError
from torchchat_core.tokenizers import hugging_face, sentencepiece_file, slicing
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader, hugging_face_tokenizer
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceReader
from torchchat_core.tokenizers.tiktoken_file import TiktokenReader
from torchchat_core.tokenizers.words import Words

WORDS = ["the", "quick", "brown", "caf\u00e9", "e\u0301", "\u4e16\u754c", "\U0001f600", "don't", "1234567",
         "<s>", "</s>", "<|end|>", "\n\n", "\t", "    ", "aaaa", "http://x.org/?a=b", "\u00a0",
         "\ufb01", "\ud55c", "!!!", "x_y"]
READERS = {"llama2": (SentencePieceReader, "tokenizer.model"), "mistral-v3": (SentencePieceReader, "tokenizer.model"),
           "llama3": (TiktokenReader, "tokenizer.model"), "phi-2": (HuggingFaceReader, "tokenizer.json")}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def texts(seed: int, length: int) -> list[str]:
    """Return texts of words in random order, and of repeated characters."""
    draw = random.Random(seed)
    mixed = draw.choice(("", " ")).join(draw.choice(WORDS) for _ in range(length // 4))
    return [mixed, " ".join(draw.choice(WORDS) for _ in range(length // 4)), "a" * length, " " * length,
            "".join(draw.choice("0123456789") for _ in range(length)), "the quick brown " * (length // 16)]


def made(kind: str) -> tokenizers.Tokenizer:
    byte_level = kind in ("gpt2", "llama3", "no cut")
    made = tokenizers.Tokenizer(models.Unigram() if kind == "unigram" else
                                models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    alphabet = list(pre_tokenizers.ByteLevel.alphabet()) if byte_level else []
    byte_pieces = [] if byte_level else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer: Any = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet,
                                       special_tokens=byte_pieces)
    if byte_level:
        pattern = {"gpt2": GPT2, "llama3": LLAMA3, "no cut": r"[\s\S]+"}[kind]
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.normalizer = normalizers.NFC()
        made.decoder = decoders.ByteLevel()
    elif kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, unk_token="<unk>",
                                          special_tokens=["<unk>"])
    made.train_from_iterator([" ".join(WORDS) * 3, *texts(7, 400)], trainer)
    made.add_special_tokens([tokenizers.AddedToken("<s>", rstrip=True), "</s>"])
    made.add_tokens(["<|end|>", "    "])
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in slices of 300 characters."""
    monkeypatch.setattr(slicing.slices, "__defaults__", (300, 32, 1 << 20))
    monkeypatch.setattr(sentencepiece_file, "SLICE", 300)


def check(tokenizer: Any, length: int = 3000) -> None:
    for text, special in itertools.product(texts(3, length), (False, True)):
        parts = [list(part) for part in tokenizer.encode_slices(text, special=special)]
        assert list(itertools.chain.from_iterable(parts)) == tokenizer.encode(text, special=special), text[:60]
    parts = [list(part) for part in tokenizer.encode_slices(texts(3, length)[1])]
    assert len(parts) > 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "no cut", "prepend", "unigram"])
def test_slices_give_the_same_ids_as_the_whole_text(kind: str) -> None:
    check(hugging_face_tokenizer(json.loads(made(kind).to_str()), "tokenizer.json", {"bos_token": "<s>"}))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["llama2", "mistral-v3", "phi-2"])
def test_slices_with_real_tokenizers_give_the_same_ids_as_the_whole_text(testdata: Path, name: str) -> None:
    reader, file = READERS[name]
    check(reader().read(testdata / "tokenizers" / name / file, {}))


@pytest.mark.usefixtures("small")
def test_slices_of_a_conversation_give_the_same_ids_as_the_whole() -> None:
    tokenizer = hugging_face_tokenizer(json.loads(made("gpt2").to_str()), "tokenizer.json", {"bos_token": "<s>"})
    start, end = tokenizer.special_tokens["<s>"], tokenizer.special_tokens["</s>"]
    parts = [start, "say </s> " + texts(3, 2000)[1], end, start, "the end"]
    assert list(itertools.chain.from_iterable(tokenizer.encode_slices(parts))) == tokenizer.encode_parts(parts)


def test_a_text_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(TorchchatError, match="cannot be cut"):
        list(slicing.slices("a" * 5000, lambda text: ([len(text)], [0]), size=300, edge=32, longest=1000))


def test_a_regular_expression_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(made("no cut").to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"(\S+\s?)+"}
    tokenizer = hugging_face_tokenizer(content, "tokenizer.json", {})
    monkeypatch.setattr(hugging_face, "MAX_SECONDS", -1.0)
    with pytest.raises(TorchchatError, match=r"tokenizer\.json fails: .*too long"):
        list(tokenizer.encode_slices("the quick brown fox " * 100))


@pytest.mark.parametrize(("kind", "bounded"), [("gpt2", False), ("no strip", True), ("prepend", False),
                                               ("unigram", False)])
def test_the_longest_token_is_known_where_text_is_never_dropped(kind: str, bounded: bool) -> None:
    content = json.loads(made("gpt2" if kind == "no strip" else kind).to_str())
    if kind == "no strip":
        content["added_tokens"] = [{**token, "rstrip": False} for token in content["added_tokens"]]
    tokenizer = hugging_face_tokenizer(content, "tokenizer.json", {})
    assert (tokenizer.longest_token is not None) is bounded
    if bounded:
        sizes = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]
        assert tokenizer.longest_token >= max(sizes)


@pytest.mark.parametrize(("name", "longest"), [("llama2", 16), ("mistral-v3", 16), ("llama3", 128)])
def test_the_longest_token_of_real_tokenizers(testdata: Path, name: str, longest: int) -> None:
    reader, file = READERS[name]
    tokenizer = reader().read(testdata / "tokenizers" / name / file, {})
    assert tokenizer.longest_token is not None
    assert longest <= tokenizer.longest_token < 10 * longest


def test_search_in_long_texts_equals_search_in_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(["ab", "abc", "<|x|>", "c"])
    text = "ab abcc<|x|><|xab" * 9
    whole = words.split(text)
    assert whole[:6] == [("ab", True), (" ", False), ("abc", True), ("c", True), ("<|x|>", True), ("<|x", False)]
    monkeypatch.setattr("torchchat_core.tokenizers.words.WINDOW", 3)
    assert words.split(text) == whole
    assert words.replace("xabx", str.upper) == "xABx"
