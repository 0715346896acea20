"""Llama 3's tokenizer.model."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.tiktoken_file import TiktokenReader, TiktokenTokenizer

Real = Callable[[str], Tokenizer]
LLAMA3 = "tokenizers/llama3/tokenizer.model"


def lines_of(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


BYTES = [bytes([byte]) for byte in range(256)]


def test_llama3_control_tokens_have_their_ids(real: Real) -> None:
    special = real(LLAMA3).special_tokens
    assert len(special) == 256
    assert {text: special[text] for text in ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                             "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")} == {
        "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009, "<|python_tag|>": 128010}
    assert sorted(special.values()) == list(range(128000, 128256))


@pytest.mark.parametrize("run", ["a", " ", "\n", "!", "ab", "\N{GRINNING FACE}"])
def test_very_long_runs_are_encoded_in_linear_time(run: str, real: Real) -> None:
    text = run * (1_000_000 // len(run))
    started = time.process_time()
    ids = real(LLAMA3).encode(text)
    assert time.process_time() - started < 30  # quadratic work takes minutes
    assert real(LLAMA3).decode(ids) == text


def test_cutting_long_text_leaves_ordinary_text_as_it_is(real: Real) -> None:
    sentence = "The quick brown fox, 12345 of them!\n\n"
    once = real(LLAMA3).encode(sentence * 3)
    assert real(LLAMA3).encode(sentence * 3 * 1000) == once * 1000


def test_settings_name_control_tokens_and_bos(testdata: Path) -> None:
    settings = {"added_tokens_decoder": {"128011": {"content": "<|mine|>", "special": True}}, "add_bos_token": False,
                "eos_token": "<|eot_id|>"}
    tokenizer = TiktokenReader().read(testdata / LLAMA3, settings)
    assert tokenizer.special_tokens["<|mine|>"] == 128011
    assert "<|image|>" not in tokenizer.special_tokens
    assert (tokenizer.eos_id, tokenizer.adds_bos) == (128009, False)


def test_a_small_file_merges_by_rank() -> None:
    ranks = {token: rank for rank, token in enumerate([*BYTES, b"ab", b"bc", b"abc"])}
    tokenizer = TiktokenTokenizer(ranks, {"<|begin_of_text|>": 259}, {}, "tokenizer.model")
    assert tokenizer.encode("abc") == [258]
    assert tokenizer.encode("bc") == [257]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (260, 259, None)


@pytest.mark.parametrize(("content", "message"), [
    (b"IQ== zero\n", "line 1"),
    (b"IQ== 0\n!!!! 1\n", "line 2"),
    (b"IQ== 0 1\n", "line 1"),
    (b"IQ== 0\nIg==\n", "line 2"),
    (b"IQ== 99999999999999999999\n", "ranks"),
    (b"IQ== 1\n", "ranks"),
    (lines_of(BYTES), "has 256 tokens; Llama 3's has 128000"),
    (lines_of([*BYTES, *(b"x%06d" % number for number in range(200_000))]), "200256 tokens"),
    (lines_of([*BYTES[1:], *(b"x%06d" % number for number in range(127_745))]), "no token for the byte 0x00"),
    (lines_of(BYTES)[:-5], "line 256"),
    (b"\x00\xff\xfe", "line 1"),
])
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TorchchatError, match=message):
        TiktokenReader().read(path, {})
