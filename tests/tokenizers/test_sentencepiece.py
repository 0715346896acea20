"""SentencePiece models, and tokens that settings add to them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from torchchat_core.errors import TorchchatError
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceReader

Real = Callable[[str], Tokenizer]
CHATML = {"added_tokens_decoder": {
    "0": {"content": "<unk>", "special": True},
    "32000": {"content": "<|im_end|>", "special": True},
    "32001": {"content": "<|im_start|>", "special": True},
    "32005": {"content": "<think>", "special": False},
}, "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model which, as Gemma's, has turn marks as pieces that the library finds in any text."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 5), model_writer=written,
        vocab_size=320, model_type="bpe", byte_fallback=True, user_defined_symbols=["<start>", "<end>"],
        minloglevel=3, hard_vocab_limit=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity")
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


def test_added_control_tokens_beyond_the_model_file(testdata: Path) -> None:
    tokenizer = SentencePieceReader().read(testdata / "tokenizers/llama2/tokenizer.model", CHATML)
    assert tokenizer.vocab_size == 32006
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 32000, False)
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = tokenizer.encode(text, special=True)
    assert (ids[0], ids[-1]) == (32001, 32000)
    assert tokenizer.decode(ids) == "user\nhi"
    assert max(tokenizer.encode(text)) < 32000
    assert "<unk>" not in tokenizer.special_tokens


def test_added_tokens_that_are_text_are_always_found_and_shown(testdata: Path) -> None:
    tokenizer = SentencePieceReader().read(testdata / "tokenizers/llama2/tokenizer.model", CHATML)
    assert tokenizer.encode("a<think>") == [*tokenizer.encode("a"), 32005]
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"
    assert tokenizer.token_bytes(32005) == b"<think>"
    assert tokenizer.token_bytes(32003) == "\ufffd".encode()  # no token has this id


def test_added_tokens_json_beside_the_model_file(testdata: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((testdata / "tokenizers/llama2/tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32000}), "utf-8")
    assert SentencePieceReader().read(path, {}).special_tokens["<|im_end|>"] == 32000
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": -5}), "utf-8")
    with pytest.raises(TorchchatError, match=r"added_tokens.json has '<\|im_end\|>': -5"):
        SentencePieceReader().read(path, {})


@pytest.mark.parametrize("declared", [[], "x", {"a": {"content": "x"}}, {"5": "x"}, {"9" * 50: {"content": "x"}}])
def test_malformed_added_tokens_are_refused(declared: object, testdata: Path) -> None:
    path = testdata / "tinyllamas/stories260K/tok512.model"
    if declared == []:
        SentencePieceReader().read(path, {"added_tokens_decoder": declared})  # none
        return
    with pytest.raises(TorchchatError, match="added_tokens_decoder"):
        SentencePieceReader().read(path, {"added_tokens_decoder": declared})


def test_the_prefix_space_follows_bos_and_other_control_tokens_only_with_legacy(testdata: Path) -> None:
    path = testdata / "tokenizers/llama2/tokenizer.model"
    plain = SentencePieceReader().read(path, CHATML)
    legacy = SentencePieceReader().read(path, {**CHATML, "legacy": True})
    with_space, without = plain.encode("user"), legacy.encode("\nuser")[2:]
    assert plain.encode("<s>user", special=True) == [1, *with_space]
    assert plain.encode("<|im_start|>user", special=True) == [32001, *without]
    assert legacy.encode("<|im_start|>user", special=True) == [32001, *with_space]


def test_llama2_prompts_have_the_ids_of_its_reference(real: Real) -> None:
    ids = real("tokenizers/llama2/tokenizer.model").encode("<s>[INST] Hello [/INST]", special=True)
    assert ids == [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]


def test_mistral_instructions_are_control_tokens(real: Real) -> None:
    tokenizer = real("tokenizers/mistral-v3/tokenizer.model")
    assert tokenizer.encode("<s>[INST] Hello[/INST]", special=True) == [1, 3, *tokenizer.encode("Hello"), 4]
    assert not {3, 4} & set(tokenizer.encode("[INST] Hello[/INST]"))


def test_control_tokens_that_the_library_finds_by_itself_are_kept_out_of_ordinary_text(small_model: Path) -> None:
    plain = SentencePieceReader().read(small_model, {})
    start = plain.encode("<start>")[-1]
    settings = {"added_tokens_decoder": {str(start): {"content": "<start>", "special": True}}}
    tokenizer = SentencePieceReader().read(small_model, settings)
    text = "the <start><start> fox <end>"
    assert start not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True).count(start) == 2
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == "the  fox <end>"


def test_byte_pieces_have_their_byte(small_model: Path) -> None:
    tokenizer = SentencePieceReader().read(small_model, {})
    ids = tokenizer.encode("\x00\N{GRINNING FACE}")
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" \x00" + "\N{GRINNING FACE}".encode()


def test_add_prefix_space_can_be_switched_off(testdata: Path) -> None:
    path = testdata / "tokenizers/llama2/tokenizer.model"
    tokenizer = SentencePieceReader().read(path, {"add_prefix_space": False})
    assert not tokenizer.adds_prefix_space
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:-7], lambda data: b"garbage" + data,
                                    lambda data: data[:5000] + b"\xff" * 5000, lambda data: data[:13],
                                    lambda data: data[:20] + b"\xff\xff\xff\xff\x0f" + data[25:]])
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], testdata: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage((testdata / "tinyllamas/stories260K/tok512.model").read_bytes()))
    with pytest.raises(TorchchatError, match=r"tokenizer\.model"):
        SentencePieceReader().read(path, {})
