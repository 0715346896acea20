"""Tokenizers in GGUF files give llama.cpp's ids, and refuse what is damaged or unknown."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from transformers import AutoTokenizer

from tc_gguf.file import read_gguf
from tc_gguf.pre_tokenizers import PRE_TOKENIZERS, as_tokenizer_json, name_of, pre_tokenizer
from tc_gguf.reader import GgufTokenizerReader
from tc_gguf.vocabulary import read_vocabulary
from torchchat_core.conversation import render
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import load_registry
from torchchat_core.specs import ModelFiles, ModelRef, Tokenizer
from torchchat_core.testing.tokenizer_contract import DIFFICULT_TEXTS
from torchchat_core.text_content import text_content, text_format_of
from torchchat_core.text_format import read_text_format
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader, byte_level_alphabet
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceReader

ALPHABET = byte_level_alphabet()
BYTES = list(ALPHABET)
SPM: Mapping[str, Any] = {
    "model": "llama", "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"],
    "scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0], "token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
}
BPE: Mapping[str, Any] = {
    "model": "gpt2", "pre": "gpt-2", "tokens": [*BYTES, "he", "ll", "hell", "<|end|>", "<tool>"],
    "token_type": [1] * 259 + [3, 4], "merges": ["h e", "l l", "he ll"], "eos_token_id": 259,
}
END, TOOL = 259, 260


def write(path: Path, keys: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> Path:
    """A GGUF file without tensors, with keys that follow "tokenizer.ggml.", and others by their whole names."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**{f"tokenizer.ggml.{key}": value for key, value in keys.items()}, **(others or {})}.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Tokenizer]:
    """The tokenizer of a file made of `keys`, with changes; a key whose value is None is left out."""

    def make(keys: Mapping[str, Any], others: Mapping[str, Any] | None = None, **changes: Any) -> Tokenizer:
        chosen = {key: value for key, value in {**keys, **changes}.items() if value is not None}
        return GgufTokenizerReader().read(write(tmp_path / "made.gguf", chosen, others), {})

    return make


def vectors(testdata: Path, name: str) -> Iterator[tuple[str, list[int]]]:
    texts = (testdata / f"gguf-vocab/ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (testdata / f"gguf-vocab/ggml-vocab-{name}.gguf.out").read_text("utf-8").splitlines()
    assert (len(lines), texts.pop()) == (len(texts), "")  # a separator stands after the last case
    return ((text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True))


def texts_of(testdata: Path) -> Sequence[str]:
    return [*DIFFICULT_TEXTS, *json.loads((testdata / "golden/tokenizers.json").read_text("utf-8"))["strings"]]


# ---- the ids of others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_encoding_matches_the_vectors_of_llama_cpp(name: str, testdata: Path) -> None:
    tokenizer = GgufTokenizerReader().read(testdata / f"gguf-vocab/ggml-vocab-{name}.gguf", {})
    for text, ids in vectors(testdata, name):
        assert tokenizer.encode(text) == ids, text


def test_encoding_matches_the_model_s_own_tokenizer_json(testdata: Path) -> None:
    tokenizer = GgufTokenizerReader().read(testdata / "gguf/TinyStories-656K-Q8_0.gguf", {})
    own = HuggingFaceReader().read(testdata / "hf/TinyStories-656K/tokenizer.json", {})
    for text in [*texts_of(testdata), (testdata / "text/tinystories_2MiB.txt").read_text("utf-8")[:50_000]]:
        assert tokenizer.encode(text) == own.encode(text), text[:60]


def test_encoding_matches_the_model_s_own_sentencepiece_file(testdata: Path) -> None:
    """But for spaces, which the model drops where there are too many, and of which the GGUF file does not say so."""
    tokenizer = GgufTokenizerReader().read(testdata / "tinyllamas/stories260K/stories260K.gguf", {})
    own = SentencePieceReader().read(testdata / "tinyllamas/stories260K/tok512.model", {})
    compared = [text for text in texts_of(testdata)
                if "  " not in (spaced := f" {text} ".replace("\u2581", " ")) and len(spaced) > 2]
    assert len(compared) > 40
    for text in compared:
        assert tokenizer.encode(text) == own.encode(text), text


# ---- extracting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "name"), [("gguf-vocab/ggml-vocab-gpt-2.gguf", "tokenizer.json"),
                                            ("gguf-vocab/ggml-vocab-llama-spm.gguf", "tokenizer.model"),
                                            ("gguf/TinyStories-656K-F16.gguf", "tokenizer.model")])
def test_extracted_files_are_the_same_tokenizer(path: str, name: str, testdata: Path, tmp_path: Path) -> None:
    reader = GgufTokenizerReader()
    inside = reader.read(testdata / path, {})
    for file, content in reader.extract(testdata / path).items():
        (tmp_path / file).write_bytes(content)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    own_reader = HuggingFaceReader() if name == "tokenizer.json" else SentencePieceReader()
    outside = own_reader.read(tmp_path / name, settings)
    for text in texts_of(testdata):
        assert outside.encode(text) == inside.encode(text), text
    facts = [(each.bos_id, each.eos_id, each.adds_bos, each.vocab_size, each.special_tokens)
             for each in (inside, outside)]
    assert facts[0] == facts[1]


def test_transformers_reads_what_is_extracted(made: Callable[..., Tokenizer], tmp_path: Path) -> None:
    templates = {"tokenizer.chat_template": "{{ messages }}"}
    inside = made(BPE, templates, bos_token_id=END, add_bos_token=True)
    for name, content in GgufTokenizerReader().extract(tmp_path / "made.gguf").items():
        (tmp_path / name).write_bytes(content)
    outside = AutoTokenizer.from_pretrained(tmp_path)
    for text in DIFFICULT_TEXTS:
        assert outside.encode(text) == [END, *inside.encode(text)], text
    assert (outside.eos_token_id, outside.chat_template) == (END, "{{ messages }}")


def test_templates_for_tools_are_kept_and_extracted(made: Callable[..., Tokenizer], tmp_path: Path) -> None:
    inside = made(BPE, {"tokenizer.chat_template": "one", "tokenizer.chat_templates": ["tool_use"],
               "tokenizer.chat_template.tool_use": "two"})
    settings = json.loads(GgufTokenizerReader().extract(tmp_path / "made.gguf")["tokenizer_config.json"])
    assert settings["chat_template"] == [{"name": "default", "template": "one"},
                                         {"name": "tool_use", "template": "two"}] == inside.chat_template


# ---- what the keys mean -------------------------------------------------------------------------------------------


def test_control_tokens_come_when_asked_for_and_user_defined_ones_always(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made(BPE)
    assert tokenizer.special_tokens == {"<|end|>": END}
    assert END not in tokenizer.encode("a<|end|>")
    assert TOOL in tokenizer.encode("a<tool>b")
    assert tokenizer.encode("a<|end|>", special=True) == [BYTES.index("a"), END]


def test_user_defined_tokens_of_sentencepiece_are_found_in_text(made: Callable[..., Tokenizer]) -> None:
    changes = {"tokens": [*SPM["tokens"], "<tool>", "  "], "scores": [*SPM["scores"], 0.0, 0.0],
               "token_type": [*SPM["token_type"], 4, 4]}
    assert made(SPM, **changes).encode("ab<tool>a  b") == [7, 8, 3, 4, 9, 3, 5]  # with a space after each token


def with_tokens(testdata: Path, path: Path, added: Sequence[tuple[str, int]], others: Mapping[str, Any],
                types: Mapping[int, int] | None = None, **changes: Any) -> Tokenizer:
    """Return the tokenizer of a file with the vocabulary of stories260K and added tokens of the given types."""
    own = read_vocabulary(read_gguf(testdata / "tinyllamas/stories260K/stories260K.gguf"))
    keys = {"model": "llama", "tokens": [*own.tokens, *(text for text, _ in added)],
            "scores": [*own.scores, *(0.0 for _ in added)], "bos_token_id": 1, "eos_token_id": 2,
            "token_type": [*((types or {}).get(token, kind) for token, kind in enumerate(own.types)),
                           *(kind for _, kind in added)], **changes}
    return GgufTokenizerReader().read(write(path, keys, others), {})


@pytest.mark.parametrize(("text", "ids"), [
    ("<|im_start|>hello there<|im_end|>\nhi", [512, 281, 306, 414, 383, 513, 410, 13, 415, 417]),
    ("one<tool>two", [353, 411, 514, 259, 424, 414]), ("a  b", [261, 515, 268]),
    (" a<tool> b", [410, 261, 514, 410, 268]), ("<s> a", [1, 410, 261]), ("a</s> b", [261, 2, 410, 268])])
def test_sentencepiece_adds_a_space_after_each_special_token_as_in_llama_cpp(
        text: str, ids: list[int], testdata: Path, tmp_path: Path) -> None:
    """The ids are those of llama.cpp."""
    tokens = [("<|im_start|>", 3), ("<|im_end|>", 3), ("<tool>", 4), ("  ", 4)]
    assert with_tokens(testdata, tmp_path / "x.gguf", tokens, {}).encode(text, special=True) == ids


@pytest.mark.parametrize(("text", "special", "plain"), [
    ("a</s> b", [261, 2, 268], [261, 504, 492, 419, 505, 268]),
    ("a</s>  \n b", [261, 2, 268], [261, 504, 492, 419, 505, 410, 410, 13, 268]),
    (" </s>\nb", [410, 410, 2, 268], [410, 410, 504, 492, 419, 505, 13, 430]),
    ("<|user|>\nhello<|end|>\n<|assistant|>\n", [515, 281, 306, 414, 514, 513], None),
    ("<|user|> hello <|end|> x", [515, 281, 306, 414, 410, 514, 410, 444], None),
    ("<s> a", [1, 410, 261], [410, 504, 419, 505, 261]), ("<|endoftext|> b", [512, 410, 268], None)])
def test_phi3_special_tokens_strip_the_white_space_after_them_as_in_llama_cpp(
        text: str, special: list[int], plain: list[int] | None, testdata: Path, tmp_path: Path) -> None:
    """The ids are those of llama.cpp; </s> is a user-defined token in such files."""
    tokens = [("<|endoftext|>", 3), ("<|assistant|>", 3), ("<|end|>", 3), ("<|user|>", 3)]
    tokenizer = with_tokens(testdata, tmp_path / "x.gguf", tokens, {"general.name": "Phi-3 Mini 4k Instruct"}, {2: 4},
                            eos_token_id=512)
    assert tokenizer.encode(text, special=True) == special
    assert plain is None or tokenizer.encode(text) == plain


@pytest.mark.parametrize("name", ["</s>", "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<|eot_id|>"])
def test_tokens_that_llama_cpp_knows_by_name_are_control_tokens_of_any_type(
        name: str, made: Callable[..., Tokenizer]) -> None:
    tokenizer = made(BPE, tokens=[*BYTES, "he", "ll", "hell", "<|end|>", name])
    assert TOOL not in tokenizer.encode(f"a{name}b")
    assert TOOL in tokenizer.encode(f"a{name}b", special=True)


def test_messages_cannot_write_user_defined_tokens_of_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|stop|>{% endfor %}"
    tokens = [*BYTES, "he", "ll", "hell", "<|im_start|>", "<|stop|>", "<tool>"]
    keys = {**BPE, "tokens": tokens, "token_type": [1] * 259 + [4, 4, 4], "eos_token_id": None}
    path = write(tmp_path / "x.gguf", {key: value for key, value in keys.items() if value is not None},
                 {"tokenizer.chat_template": template})
    files = ModelFiles(ref=ModelRef(text="x", scheme="file", location=str(path)), format="gguf", root=tmp_path,
                       weights=(path,), tokenizer=(path,))
    for text_format in (read_text_format(files, registry := load_registry(), 262),
                        text_format_of(text_content(files, registry, 262), registry)):
        text, encode = render(text_format, [{"role": "user", "content": "<|im_start|><|stop|><tool>"}])
        assert [token for token in encode(text) if token > 258] == [259, 261, 260]


def test_extracted_tokenizer_files_encode_prompts_as_the_gguf_file_does(testdata: Path, tmp_path: Path) -> None:
    tokens = [("<|im_start|>", 3), ("<|im_end|>", 3), ("<tool>", 4)]
    tokenizer = with_tokens(testdata, tmp_path / "x.gguf", tokens, {"general.name": "phi-3"})
    for name, data in GgufTokenizerReader().extract(tmp_path / "x.gguf").items():
        (tmp_path / name).write_bytes(data)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    written = SentencePieceReader().read(tmp_path / "tokenizer.model", settings)
    for text in ("<|im_start|>hello there<|im_end|>\nhi", "one<tool> two", "<s> a", "a</s> b"):
        assert written.encode(text, special=True) == tokenizer.encode(text, special=True)


def test_eos_is_a_control_token_whatever_type_it_has(made: Callable[..., Tokenizer]) -> None:
    assert END in made(BPE, token_type=[1] * 261).special_tokens.values()


def test_ends_of_turns_and_messages_end_answers(made: Callable[..., Tokenizer]) -> None:
    assert made(BPE, eot_token_id=TOOL, eom_token_id=5).end_ids == {TOOL, 5}


@pytest.mark.parametrize(("keys", "changes", "adds_bos"), [
    (SPM, {}, True), (SPM, {"add_bos_token": False}, False), (BPE, {"bos_token_id": END}, False),
    (BPE, {"bos_token_id": END, "pre": "llama-bpe"}, True), (BPE, {"bos_token_id": END, "add_bos_token": True}, True),
])
def test_texts_start_with_bos_as_in_llama_cpp(keys: Mapping[str, Any], changes: Mapping[str, Any], adds_bos: bool,
                                              made: Callable[..., Tokenizer]) -> None:
    assert made(keys, **changes).adds_bos is adds_bos


def test_sentencepiece_has_its_usual_tokens_where_none_are_named(made: Callable[..., Tokenizer]) -> None:
    unnamed = made(SPM, bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (unnamed.bos_id, unnamed.eos_id) == (1, 2)
    none = made(SPM, bos_token_id=0xFFFFFFFF)
    assert (none.bos_id, none.adds_bos) == (None, False)


def test_a_space_is_put_in_front_unless_the_file_says_no(made: Callable[..., Tokenizer]) -> None:
    assert made(SPM).encode("ab") == [7]
    assert made(SPM, add_space_prefix=False).encode("ab") == [6]


def test_extra_spaces_go_where_the_file_says_so(made: Callable[..., Tokenizer]) -> None:
    assert made(SPM).encode("a  b") == [3, 4, 3, 3, 5]
    assert made(SPM, remove_extra_whitespaces=True).encode("a  b") == [3, 4, 3, 5]


def test_scores_decide_what_is_merged_first(made: Callable[..., Tokenizer]) -> None:
    tokens, types = [*SPM["tokens"], "ba"], [*SPM["token_type"], 1]
    assert made(SPM, tokens=tokens, token_type=types, scores=[*SPM["scores"], -0.5]).encode("bab") == [3, 8, 5]
    assert made(SPM, tokens=tokens, token_type=types, scores=[*SPM["scores"], -9.0]).encode("bab") == [3, 5, 6]


def test_empty_tokens_get_names_of_their_own(made: Callable[..., Tokenizer]) -> None:
    assert made(SPM, tokens=[*SPM["tokens"][:-1], ""]).token_bytes(7) == b"[EMPTY_7]"


def test_the_default_chat_template_is_the_tokenizer_s(made: Callable[..., Tokenizer]) -> None:
    assert made(SPM).chat_template is None
    assert made(SPM, {"tokenizer.chat_template": "{{ messages }}"}).chat_template == "{{ messages }}"


# ---- pre-tokenizers -----------------------------------------------------------------------------------------------


def cut(pre: str, text: str) -> list[str]:
    content = {"model": {"type": "BPE", "vocab": {}, "merges": []},
               "pre_tokenizer": as_tokenizer_json(PRE_TOKENIZERS[pre].expressions)}
    words = tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer.pre_tokenize_str(text)
    return [bytes(ALPHABET[character] for character in word).decode() for word, _ in words]


@pytest.mark.parametrize(("pre", "words"), [
    ("gpt-2", ["I", "'", "LL", " don", "'t", " x", "  ", " 12345"]),
    ("llama-bpe", ["I", "'LL", " don", "'t", " x", "  ", " ", "123", "45"]),
    ("qwen2", ["I", "'LL", " don", "'t", " x", "  ", " ", "1", "2", "3", "4", "5"]),
    ("smollm", ["I", "'", "LL", " don", "'t", " x", "   ", "1", "2", "3", "4", "5"]),
    ("tekken", ["I", "'LL", " don", "'t", " x", "  ", " ", "1", "2", "3", "4", "5"]),
    ("gpt-4o", ["I'LL", " don't", " x", "  ", " ", "123", "45"]),
    ("default", ["I", "'", "LL", " don", "'", "t", " x", "  ", " ", "123", "45"]),
])
def test_texts_are_cut_into_words(pre: str, words: list[str]) -> None:
    assert cut(pre, "I'LL don't x   12345") == words


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_no_text_is_lost_between_words(pre: str) -> None:
    for text in DIFFICULT_TEXTS:
        assert "".join(cut(pre, text)) == text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "dbrx", "qwen2", "smollm", "tekken", "gpt-4o", "default"])
def test_the_name_is_found_again(pre: str) -> None:
    kind = PRE_TOKENIZERS[pre]
    assert name_of(as_tokenizer_json(kind.expressions), kind.ignore_merges) == pre


def test_digits_of_their_own_before_gpt2_s_words_have_a_name() -> None:
    steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
    assert name_of({"type": "Sequence", "pretokenizers": steps}, ignore_merges=False) == "smollm"
    assert name_of({"type": "Whitespace"}, ignore_merges=False) is None


def test_without_a_name_texts_are_cut_as_default_says(made: Callable[..., Tokenizer]) -> None:
    tokens = [*BYTES, "'s", "<|end|>"]
    changes = {"tokens": tokens, "merges": ["' s"], "token_type": [1] * 258, "eos_token_id": None}
    joined, apart = [256], [BYTES.index("'"), BYTES.index("s")]
    assert made(BPE, **changes).encode("'s") == joined
    assert made(BPE, **changes, pre=None).encode("'s") == made(BPE, **changes, pre="default").encode("'s") == apart


def test_words_that_are_tokens_need_no_merges_where_the_pre_tokenizer_says_so(made: Callable[..., Tokenizer]) -> None:
    changes = {"merges": ["h e"], "eos_token_id": None}
    assert made(BPE, **changes, pre="llama-bpe").encode("hell") == [258]
    assert made(BPE, **changes, pre="dbrx").encode("hell") == [256, BYTES.index("l"), BYTES.index("l")]


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_files_without_a_tokenizer_are_not_accepted(tmp_path: Path) -> None:
    reader = GgufTokenizerReader()
    (tmp_path / "other.gguf").write_bytes(b"something else")
    accepted = [reader.accepts(path) for path in (
        write(tmp_path / "none.gguf", {"model": "none"}), write(tmp_path / "nothing.gguf", {}),
        write(tmp_path / "no_vocab.gguf", {"model": "no_vocab"}), tmp_path / "other.gguf",
        write(tmp_path / "bert.gguf", {"model": "bert"}), write(tmp_path / "spm.gguf", SPM))]
    assert accepted == [False, False, False, False, True, True]  # of those that are accepted, one is refused later


def test_a_damaged_file_is_told_rather_than_passed_over(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", SPM).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:200])
    with pytest.raises(TorchchatError, match=r"cut\.gguf ends within|can hold"):
        GgufTokenizerReader().accepts(tmp_path / "cut.gguf")


REFUSED: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], str]] = [
    (SPM, {"model": "bert"}, "of the kind 'bert'; llama .SentencePiece. and gpt2 .byte-level BPE. are read"),
    (SPM, {"model": "gemma4"}, "of the kind 'gemma4'"),
    (SPM, {"model": 7}, "tokenizer.ggml.model is 7"),
    (BPE, {"pre": "qwen-2"}, "pre-tokenizer 'qwen-2' is not known; known are gpt-2, .*did you mean qwen2"),
    (SPM, {"tokens": None}, "has no 'tokenizer.ggml.tokens'"),
    (SPM, {"tokens": [1, 2, 3]}, "has to be a list of texts"),
    (SPM, {"tokens": [*SPM["tokens"][:-1], "a"]}, "holds the token 'a' twice"),
    (SPM, {"scores": [0.0] * 7}, "scores in made.gguf has 7 entries, for 8 tokens"),
    (SPM, {"scores": [float("nan")] * 8}, "holds the score nan"),
    (SPM, {"scores": ["a"] * 8}, "has to be a list of numbers"),
    (SPM, {"token_type": [1] * 9}, "token_type in made.gguf has 9 entries, for 8 tokens"),
    (SPM, {"token_type": [1] * 7 + [9]}, "holds the token type 9"),
    (SPM, {"token_type": [2, 3, 3, 1, 6, 6, 1, 1]}, "has tokens for 2 of the 256 bytes"),
    (SPM, {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    (SPM, {"add_bos_token": "yes"}, "has to be true or false"),
    (BPE, {"merges": None}, "has no 'tokenizer.ggml.merges'"),
    (BPE, {"merges": ["h e", "x y"]}, "cannot be read: .*out of vocabulary"),
    (BPE, {"merges": ["he"]}, "cannot be read"),
]


@pytest.mark.parametrize(("keys", "changes", "words"), REFUSED, ids=[f"{words:.30}" for _, _, words in REFUSED])
def test_damaged_and_unknown_vocabularies_are_refused(keys: Mapping[str, Any], changes: Mapping[str, Any], words: str,
                                                      made: Callable[..., Tokenizer]) -> None:
    with pytest.raises(TorchchatError, match=f"(?s){words}"):
        made(keys, **changes)


@pytest.mark.parametrize("keys", [SPM, BPE])
@pytest.mark.parametrize("name", ["padding", "unknown", "bos", "eos", "eot", "eom"])
def test_a_special_id_out_of_range_is_ignored(
        keys: Mapping[str, Any], name: str, made: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture) -> None:
    expected = made(keys, **{f"{name}_token_id": None})
    assert not caplog.text
    for token in (99999, 1 << 31):
        found = made(keys, **{f"{name}_token_id": token})
        assert f"tokenizer.ggml.{name}_token_id is {token}, but token ids go from 0 to" in caplog.text
        facts = [(each.bos_id, each.eos_id, each.end_ids, each.special_tokens, each.encode("hello"), each.adds_bos)
                 for each in (found, expected)]
        assert facts[0] == facts[1]


@pytest.mark.parametrize(("name", "same"), [
    ("glm5", "glm4"), ("f2llmv2", "qwen2"), ("jina-v5-nano", "llama-bpe"), ("talkie", "gpt-4o"),
    ("hy_v4", "deepseek-v3"),
    *((name, "gpt-2") for name in ("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code",
                                   "modern-bert", "roberta-bpe")),
])
def test_pre_tokenizer_aliases_match_llama_cpp(name: str, same: str) -> None:
    assert pre_tokenizer(name) == pre_tokenizer(same)


def test_deepseek_llm_splits_cased_words_punctuation_and_numbers(made: Callable[..., Tokenizer]) -> None:
    merges = ["a 1", "1 2", "a .", "\u0120 a", "\u0120 \u0120"]  # some merges cross a split
    tokens = [*BPE["tokens"][:256], *(merge.replace(" ", "") for merge in merges)]
    changes = {"pre": "deepseek-llm", "tokens": tokens, "merges": merges, "token_type": [1] * len(tokens),
               "eos_token_id": None}
    tokenizer = made(BPE, **changes)

    def pieces(text: str) -> list[bytes]:
        return [tokenizer.token_bytes(token) for token in tokenizer.encode(text)]

    assert pieces("a12 a.") == [b"a", b"12", b" a", b"."]
    assert pieces("a  ") == [b"a", b"  "]


def test_an_empty_vocabulary_is_refused(make_gguf: Callable[..., bytes], tmp_path: Path) -> None:
    no_texts = struct.pack("<IIQ", 9, 8, 0)  # an array of texts, none
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": no_texts}
    (tmp_path / "empty.gguf").write_bytes(make_gguf(keys, {}))
    with pytest.raises(TorchchatError, match="is empty"):
        GgufTokenizerReader().read(tmp_path / "empty.gguf", {})


def test_a_vocabulary_may_have_fewer_tokens_than_the_model_has_rows_but_no_more(
    make_gguf: Callable[..., bytes], written: Callable[[bytes], Path]
) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in SPM.items()}
    for rows in (8, 9, 64):
        path = written(make_gguf(keys, {"token_embd.weight": (0, (rows, 2), bytes(rows * 8))}))
        assert GgufTokenizerReader().read(path, {}).vocab_size == 8
    path = written(make_gguf(keys, {"token_embd.weight": (0, (7, 2), bytes(56))}))
    with pytest.raises(TorchchatError, match=r"has 8 tokens; its token_embd\.weight has rows for 7"):
        GgufTokenizerReader().read(path, {})


def test_there_are_no_more_merges_than_ways_to_part_the_tokens(made: Callable[..., Tokenizer]) -> None:
    """The tokens he, ll, hell, <|end|> and <tool> have 1 + 1 + 3 + 6 + 5."""
    made(BPE, merges=["h e"] * 16)
    with pytest.raises(TorchchatError, match=r"merges in made\.gguf has 17 entries; the 261 tokens can have 16"):
        made(BPE, merges=["h e"] * 17)


def test_a_template_that_is_too_long_is_told_with_the_file(made: Callable[..., Tokenizer]) -> None:
    with pytest.raises(TorchchatError, match=r"a chat template in made\.gguf has 65537 characters") as caught:
        made(SPM, {"tokenizer.chat_template": "x" * 65537})
    assert "--tokenizer-path" in str(caught.value.fix)


def test_a_template_that_is_no_text_is_refused(made: Callable[..., Tokenizer]) -> None:
    with pytest.raises(TorchchatError, match=r"tokenizer\.chat_template is 5"):
        made(SPM, {"tokenizer.chat_template": 5})


@pytest.mark.parametrize("keys", [SPM, BPE], ids=["sentencepiece", "byte-level"])
def test_mutated_files_give_a_tokenizer_or_an_error(keys: Mapping[str, Any], tmp_path: Path) -> None:
    """Libraries of others read what comes of the file: none of them may crash on it."""
    whole = write(tmp_path / "whole.gguf", keys, {"tokenizer.chat_template": "x"}).read_bytes()
    chance, path = random.Random(0), tmp_path / "mutated.gguf"
    outcomes = set()
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(24, len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            tokenizer = GgufTokenizerReader().read(path, {})
        except TorchchatError:
            outcomes.add("refused")
        else:
            tokenizer.decode(tokenizer.encode("hell ab <tool> \u00e9"))
            outcomes.add("read")
    assert outcomes == {"read", "refused"}
