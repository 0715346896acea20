"""The C++ tokenizers give the ids and texts of their libraries, and of the Python ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
from probing import Probe, ProbeError

from torchchat_core.conversation import _disarmed, encode_disarmed
from torchchat_core.small_files import read_json
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceReader
from torchchat_core.tokenizers.tiktoken_file import TiktokenReader

GOLDEN = ["tokenizers/llama2/tokenizer.model", "tinyllamas/stories260K/tok512.model",
          "tokenizers/mistral-v3/tokenizer.model", "tokenizers/llama3/tokenizer.model",
          "hf/TinyStories-656K/tokenizer.json", "tokenizers/phi-2/tokenizer.json"]
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PARTS = ["a", "The ", " the", "'s", "'LL", "42", "1234567", "\n", "\n\n", "\r\n", "\t", "   ",
         "                                        ", "\xa0", "\u180e", "\u2003", "\x85", "\x1c", "caf\xe9", "e\u0301",
         "\u4e16\u754c", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u0e2a\u0e27\u0e31", "\u0627\u0644", "\u2581",
         "<s>", "</s>", "<|eot_id|>", "[INST]", "<unk>", "<0x0A>", "<|endoftext|>", "_", "-->", "...", "\x00",
         "\ufffd", "\u017f", "\u0130", "\xbd", "\u2167", "\uac00", "\U00020000", "http://x.y/?q=1&z",
         "def f(x):\n    return"]


def files_of(path: Path) -> dict[str, str]:
    beside = [path.parent / name for name in BESIDE if (path.parent / name).is_file()]
    return {each.name: str(each) for each in (path, *beside)}


def python_tokenizer(path: Path) -> Tokenizer:
    settings = path.parent / "tokenizer_config.json"
    reader: Any = (HuggingFaceReader() if path.suffix == ".json" else
                   SentencePieceReader() if SentencePieceReader().accepts(path) else TiktokenReader())
    return reader.read(path, read_json(settings) if settings.is_file() else {})  # type: ignore[no-any-return]


def texts(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(PARTS, k=chance.randint(1, 12))) for _ in range(count)]


def llama_cpp_vectors(testdata: Path, name: str) -> tuple[list[str], list[list[int]]]:
    found = (testdata / f"gguf-vocab/ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (testdata / f"gguf-vocab/ggml-vocab-{name}.gguf.out").read_text("utf-8").splitlines()
    return found[:-1], [[int(number) for number in line.split()] for line in lines]


@pytest.mark.parametrize("path", GOLDEN)
def test_encoding_and_decoding_match_the_golden_vectors(path: str, testdata: Path, probe: Probe) -> None:
    vectors = json.loads((testdata / "golden/tokenizers.json").read_text("utf-8"))
    encoding = vectors["encodings"][path]
    probe.ask("open", files=files_of(testdata / path))
    assert probe.ask("encode", texts=vectors["strings"], special=False) == encoding["ids"]
    assert probe.ask("decode", ids=encoding["ids"]) == encoding.get("decoded", vectors["strings"])


@pytest.mark.parametrize(("name", "path"), [("llama-bpe", "tokenizers/llama3/tokenizer.model"),
                                            ("llama-spm", "tokenizers/llama2/tokenizer.model")])
def test_encoding_matches_the_vectors_of_llama_cpp(name: str, path: str, testdata: Path, probe: Probe) -> None:
    strings, ids = llama_cpp_vectors(testdata, name)
    probe.ask("open", files=files_of(testdata / path))
    assert probe.ask("encode", texts=strings, special=False) == ids


def test_encoding_matches_gpt2_where_phi_adds_nothing(testdata: Path, tmp_path: Path, probe: Probe) -> None:
    content = json.loads((testdata / "tokenizers/phi-2/tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    strings, ids = llama_cpp_vectors(testdata, "gpt-2")
    probe.ask("open", files=files_of(tmp_path / "tokenizer.json"))
    assert probe.ask("encode", texts=strings, special=False) == ids


@pytest.mark.parametrize("path", GOLDEN)
def test_everything_is_as_in_python(path: str, testdata: Path, probe: Probe) -> None:
    tokenizer = python_tokenizer(testdata / path)
    found = probe.ask("open", files=files_of(testdata / path))
    assert found == {"vocab_size": tokenizer.vocab_size, "special_tokens": dict(tokenizer.special_tokens),
                     "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "adds_bos": tokenizer.adds_bos,
                     "adds_prefix_space": tokenizer.adds_prefix_space}
    every = range(tokenizer.vocab_size)
    assert [bytes(data) for data in probe.ask("token_bytes")] == [tokenizer.token_bytes(token) for token in every]
    strings = texts(300, seed=1)
    for special in (False, True):
        ids = [tokenizer.encode(text, special=special) for text in strings]
        assert probe.ask("encode", texts=strings, special=special) == ids
    assert probe.ask("decode", ids=ids) == [tokenizer.decode(each) for each in ids]
    drawn = random.Random(2)
    ids = [[drawn.randrange(tokenizer.vocab_size) for _ in range(20)] for _ in range(50)]
    assert probe.ask("decode", ids=ids) == [tokenizer.decode(each) for each in ids]


@pytest.mark.parametrize("path", GOLDEN)
def test_control_tokens_in_messages_are_ordinary_text_as_in_python(path: str, testdata: Path, probe: Probe) -> None:
    tokenizer = python_tokenizer(testdata / path)
    probe.ask("open", files=files_of(testdata / path))
    names = sorted(tokenizer.special_tokens)[:3]
    strings = [f"a{name}b" for name in names] + ["plain", "".join(names)] + texts(50, seed=3)
    expected = [encode_disarmed(f"[{_disarmed(text, tokenizer)}]", tokenizer) for text in strings]
    assert probe.ask("encode_disarmed", texts=strings) == expected


def metaspace(folder: Path) -> Path:
    """A tokenizer.json as `transformers` saves SentencePiece models with "legacy": false; </s> strips white space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581[]/INSTabcdefghijklmno<>"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = tokenizers.decoders
    made.decoder = steps.Sequence([steps.Metaspace(prepend_scheme="first"), steps.ByteFallback(), steps.Fuse()])
    made.add_tokens([tokenizers.AddedToken("abc"), tokenizers.AddedToken("s>x", normalized=False)])
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False, rstrip=text == "</s>")
                             for text in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["tokenizers/mistral-v3/tokenizer.model", "tokenizers/llama2/tokenizer.model",
                                  "tinyllamas/stories260K/tok512.model", "metaspace"])
def test_control_token_names_in_messages_do_not_change_other_tokens(
        name: str, legacy: bool, testdata: Path, tmp_path: Path, probe: Probe) -> None:
    path = metaspace(tmp_path) if name == "metaspace" else tmp_path / "tokenizer.model"
    if name != "metaspace":
        path.write_bytes((testdata / name).read_bytes())
    flags = {"normalized": False, "single_word": False}
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "legacy": legacy}
    if name.startswith("tinyllamas"):  # tokens in small files, some of which strip white space or are text
        settings["added_tokens_decoder"] = {
            "514": {"content": "[/INST]", "special": True, "lstrip": True, "rstrip": True, **flags},
            "515": {"content": "tool", "special": False, "lstrip": False, "rstrip": True, **flags}}
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 512, "[INST]": 513}), "utf-8")
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "[/INST]"}), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    tokenizer = python_tokenizer(path)
    reader: Any = HuggingFaceReader() if path.suffix == ".json" else SentencePieceReader()
    (tmp_path / "alone").mkdir()
    for file, data in reader.standalone(path, settings).items():
        (tmp_path / "alone" / file).write_bytes(data)
    found = probe.ask("open", files=files_of(tmp_path / "alone" / path.name))
    assert found["special_tokens"] == dict(tokenizer.special_tokens)
    assert (found["bos_id"], found["eos_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    strings = ["Use <s>old</s> tags", " </s> x", "a", "[INST]", "abcs>x </s>s>xtool  b", "<|im_start|> [/INST] tool",
               *texts(50, seed=4)]
    before, after = "<s>[INST] ", " [/INST] </s>\u2003 b</s>[INST] tool [/INST]"
    expected = [encode_disarmed(f"{before}{_disarmed(text, tokenizer)}{after}", tokenizer) for text in strings]
    assert probe.ask("encode_disarmed", texts=strings, before=before, after=after) == expected


# What real models' files have beside the byte-level BPE above: one entry each.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def split(behaviour: str, pattern: dict[str, str], invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behaviour, "invert": invert}


VARIANTS: dict[str, dict[str, Any]] = {
    "NFC and Qwen's split": {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("Isolated", {"Regex": QWEN_SPLIT}), BYTE_LEVEL]}},
    "NFKC": {"normalizer": {"type": "NFKC"}},
    "NFD, stripped": {"added_tokens": [], "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFD"}, {"type": "Strip", "strip_left": True, "strip_right": True}]}},
    "a replacement by an expression": {"added_tokens": [], "normalizer": {
        "type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}},
    "digits apart": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}},
    "digits together, punctuation": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, {"type": "Punctuation", "behavior": "Contiguous"},
        BYTE_LEVEL]}},
    "removed": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("Removed", {"String": " "}), BYTE_LEVEL]}},
    "merged with previous": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("MergedWithPrevious", {"Regex": r"\s"}), BYTE_LEVEL]}},
    "merged with next": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("MergedWithNext", {"String": " "}), BYTE_LEVEL]}},
    "inverted": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("Removed", {"Regex": r"\p{L}+"}, invert=True), BYTE_LEVEL]}},
    "white space left out": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, BYTE_LEVEL]}},
    "a space before": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True,
                                       "trim_offsets": True, "use_regex": True}},
    "Metaspace": {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581",
                                                        "prepend_scheme": "first", "split": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", ["tokenizers/phi-2/tokenizer.json", "hf/TinyStories-656K/tokenizer.json"])
def test_steps_of_tokenizer_json_are_those_of_the_library(variant: str, path: str, testdata: Path, tmp_path: Path,
                                                          probe: Probe) -> None:
    content = json.loads((testdata / path).read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **VARIANTS[variant]}), "utf-8")
    tokenizer = python_tokenizer(tmp_path / "tokenizer.json")
    probe.ask("open", files=files_of(tmp_path / "tokenizer.json"))
    strings = texts(100, seed=4)
    for text, ids in zip(strings, probe.ask("encode", texts=strings, special=False), strict=True):
        assert ids == tokenizer.encode(text), text


@pytest.mark.parametrize(("change", "said"), [
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "BertPreTokenizer"),
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
    ({"decoder": {"type": "CTC"}}, "CTC"),
    ({"model": None}, "no 'model'"),
])
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], said: str, testdata: Path, tmp_path: Path,
                                              probe: Probe) -> None:
    content = json.loads((testdata / "hf/TinyStories-656K/tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}), "utf-8")
    with pytest.raises(ProbeError, match=said):
        probe.ask("open", files=files_of(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("path", ["tinyllamas/stories260K/tok512.model", "tokenizers/llama3/tokenizer.model",
                                  "hf/TinyStories-656K/tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(path: str, testdata: Path, tmp_path: Path, probe: Probe) -> None:
    whole = (testdata / path).read_bytes()
    damaged = tmp_path / Path(path).name
    for content in (whole[: len(whole) // 2], b"", b"\n" + whole[1:50]):
        damaged.write_bytes(content)
        with pytest.raises(ProbeError):
            probe.ask("open", files=files_of(damaged))


def test_long_runs_take_no_long_time(testdata: Path, probe: Probe) -> None:
    for path in GOLDEN:
        tokenizer = python_tokenizer(testdata / path)
        probe.ask("open", files=files_of(testdata / path))
        strings = [" " * 60_000, "a" * 60_000, "\n" * 30_000, "ab " * 20_000]
        assert probe.ask("encode", texts=strings, special=False) == [tokenizer.encode(text) for text in strings]
