"""tokenizer.json in its many forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from torchchat_core.errors import TorchchatError
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader, HuggingFaceTokenizer
from torchchat_core.tokenizers.stream import TextStream

TEXTS = ["the quick brown fox", " jumps over  the", "lazy dog\n\nthe end", "na\u00efve \N{GRINNING FACE}"]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a tokenizer, with changes to its JSON, and what is beside it."""
    def written(tokenizer: tokenizers.Tokenizer, beside: dict[str, Any] | None = None, **changes: Any) -> Path:
        for name, content in (beside or {}).items():
            (tmp_path / name).write_text(json.dumps(content), "utf-8")
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}), "utf-8")
        return path
    return written


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|start|>", "<|stop|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_tokens(["<think>", "    "])
    return made


def byte_fallback(metaspace: bool) -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "t", "h", "e", "th", "the",
              "\u2581the"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    made = tokenizers.Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges,
                                           unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(),
                                          decoders.Fuse()])
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                          decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    return made


def read(path: Path, **settings: Any) -> HuggingFaceTokenizer:
    return HuggingFaceReader().read(path, settings)


@pytest.mark.parametrize("made", [byte_level(), byte_fallback(metaspace=False), byte_fallback(metaspace=True)],
                         ids=["byte level", "byte fallback", "metaspace"])
def test_every_text_comes_back(made: tokenizers.Tokenizer, write: Write) -> None:
    tokenizer = read(write(made))
    texts = ["", "the", "the  the ", "\n", "\N{GRINNING FACE}", "\x00\x7f\u00a0\u00ad", "a<think>b", "x       y"]
    if not isinstance(made.pre_tokenizer, pre_tokenizers.Metaspace):  # gives one id for "the" and " the" at the start
        texts += [" ", " the", "       x"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().endswith(text)


def test_every_byte_has_its_byte_level_token(write: Write) -> None:
    tokenizer = read(write(byte_level()))
    single = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_control_tokens_are_found_where_the_library_finds_them(write: Write) -> None:
    """Those that the file wants normalised are prefixed like a text: at its start, or behind a space."""
    made = byte_fallback(metaspace=False)
    content = json.loads(made.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = True
    path = write(made, added_tokens=content["added_tokens"])
    tokenizer, library = read(path), tokenizers.Tokenizer.from_file(str(path))
    for text in ("</s>the", "the </s>", "the</s>", "the"):
        assert tokenizer.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids
        assert 2 not in tokenizer.encode(text)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}  # <unk> stands for text


def test_added_tokens_that_are_text_are_shown(write: Write) -> None:
    tokenizer = read(write(byte_level()))
    ids = tokenizer.encode("<think>x<|stop|>", special=True)
    assert tokenizer.token_bytes(ids[0]) == b"<think>"
    assert tokenizer.decode(ids) == "<think>x"


def test_special_tokens_map_overrides_settings_without_added_tokens_decoder(write: Write) -> None:
    """`transformers` does the same."""
    beside = {"special_tokens_map.json": {"bos_token": "<|start|>", "eos_token": {"content": "<|start|>"}}}
    path = write(byte_level(), beside)
    assert (read(path).bos_id, read(path).eos_id) == (0, 0)
    names = {"bos_token": {"content": "<|stop|>"}, "eos_token": "<|stop|>"}
    older, newer = read(path, **names), read(path, **names, added_tokens_decoder={})
    assert (older.bos_id, older.eos_id, newer.bos_id, newer.eos_id) == (0, 0, 1, 1)
    transformers = pytest.importorskip("transformers")
    (path.parent / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(path.parent)
    assert (reference.bos_token_id, reference.eos_token_id) == (0, 0)


def test_without_names_there_is_no_bos_or_eos(write: Write) -> None:
    tokenizer = read(write(byte_level()), eos_token="<|absent|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (None, None, False)


def test_the_post_processor_says_whether_bos_is_added_and_is_left_out_of_encode(write: Write) -> None:
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<|start|> $A <|stop|>", special_tokens=[
        ("<|start|>", 0), ("<|stop|>", 1)])
    path = write(made)
    tokenizer = read(path, bos_token="<|start|>")
    assert tokenizer.adds_bos
    assert not {0, 1} & set(tokenizer.encode("the"))
    assert not read(path, bos_token="<|start|>", add_bos_token=False).adds_bos
    assert read(path).bos_id == 0  # by the post-processor alone


def test_truncation_and_padding_of_the_file_are_switched_off(write: Write) -> None:
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    tokenizer = read(write(made))
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    assert len(tokenizer.encode("x")) == 1


def test_word_pieces_are_streamed_with_their_spaces(write: Write) -> None:
    vocabulary = {"[UNK]": 0, "the": 1, "fox": 2, "##es": 3, "a": 4}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    tokenizer = read(write(made))
    ids = tokenizer.encode("the foxes")
    assert ids == [1, 2, 3]
    assert tokenizer.decode(ids) == "the foxes"
    stream = TextStream(tokenizer, at_start=True)
    assert [stream.push(token) for token in ids] == ["the", " fox", "es"]


def test_words_without_a_decoder_are_parted_by_spaces(write: Write) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = read(write(made))
    assert tokenizer.decode(tokenizer.encode("a b c")) == "a b <unk>"


def test_decoders_that_do_not_work_token_by_token_are_refused(write: Write) -> None:
    made = byte_level()
    made.decoder = decoders.BPEDecoder()
    with pytest.raises(TorchchatError, match="decoder 'BPEDecoder'"):
        read(write(made))


def test_holes_in_the_vocabulary_are_unknown(write: Write) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 7}, unk_token="<unk>"))
    tokenizer = read(write(made))
    assert tokenizer.vocab_size == 8
    assert tokenizer.token_bytes(3) == "\ufffd".encode()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"model": 3}', b'{"model": {"type": "BPE"}}', b"\xff\xfe",
                                     b'{"model": {"type": "Nonsense", "vocab": {}}}', b"[" * 100_000,
                                     b'{"version": "1.0", "added_tokens": 5, "model": {"type": "BPE", "vocab": []}}'])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TorchchatError, match=r"tokenizer\.json"):
        read(path)


def test_truncated_files_are_refused(write: Write) -> None:
    path = write(byte_level())
    whole = path.read_bytes()
    for length in range(1, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        with pytest.raises(TorchchatError, match="is not JSON"):
            read(path)
