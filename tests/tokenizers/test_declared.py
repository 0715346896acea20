"""Tokens that only the small files of a model declare. The expected ids are those of `transformers`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from torchchat_core.conversation import render
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.specs import ModelFiles
from torchchat_core.text_content import text_content, text_format_of
from torchchat_core.text_format import TextFormat, read_text_format

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
START, END = "<|im_start|>", "<|im_end|>"
BOTH = {START: 259, END: 260}
HI = [259, 84, 82, 68, 81, 198, 71, 72, 260, 198, 259, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198]  # of a user's "hi"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
Make = Callable[..., Path]
Formats = Callable[[Path], TextFormat]


def entry(text: str, special: bool = True, **more: Any) -> dict[str, Any]:
    return {"content": text, "special": special, **FLAGS, **more}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a byte-level tokenizer of 261 tokens with `settings`, after `change` has changed its JSON."""
    def made(change: Callable[[dict[str, Any]], None] | None = None, small: dict[str, Any] | None = None,
             template: str = CHATML, **settings: Any) -> Path:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: number for number, letter in enumerate(letters)} | {"zq": len(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("z", "q")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        tokenizer.add_tokens([AddedToken("Hello there!", normalized=False)])
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in BOTH])
        content = json.loads(tokenizer.to_str())
        if change is not None:
            change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **settings}), "utf-8")
        for name, value in (small or {}).items():
            (tmp_path / name).write_text(json.dumps(value), "utf-8")
        return tmp_path
    return made


@pytest.fixture
def read(registry: Registry, model_files: Callable[..., ModelFiles]) -> Formats:
    return lambda folder: read_text_format(model_files(folder / "tokenizer.json"), registry, 261)


def removed(content: dict[str, Any]) -> None:
    content["added_tokens"] = content["added_tokens"][:2]


def moved(content: dict[str, Any]) -> None:
    removed(content)
    content["model"]["vocab"] |= BOTH


def ordinary(content: dict[str, Any]) -> None:
    for token in content["added_tokens"][2:]:
        token["special"] = False


def prompt(text_format: TextFormat, text: str = "hi") -> list[int]:
    rendered, encode = render(text_format, [{"role": "user", "content": text}])
    return encode(rendered)


def reference(folder: Path) -> list[int]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found: list[int] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True,
                                                     return_dict=False)
    return found


DECODER = {"259": entry(START), "260": entry(END)}
MAP = {"eos_token": END, "additional_special_tokens": [START, END]}
ADDED = {"content": END, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
DECLARED: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("added_tokens_decoder", removed, {"added_tokens_decoder": DECODER}, {}),
    ("added_tokens_decoder", moved, {"added_tokens_decoder": DECODER}, {}),
    ("additional_special_tokens", moved, {"additional_special_tokens": [START, END]}, {}),
    ("additional_special_tokens, not in the vocabulary", removed, {"additional_special_tokens": [START, END]}, {}),
    ("extra_special_tokens as a list", moved, {"extra_special_tokens": [START, END]}, {}),
    ("extra_special_tokens as an object", moved, {"extra_special_tokens": {"start": START, "end": END}}, {}),
    ("names of its own", moved, {"turn_start_token": START, "turn_end_token": END}, {}),
    ("special_tokens_map.json", moved, {}, {"special_tokens_map.json": MAP}),
    ("special_tokens_map.json with objects", moved, {}, {"special_tokens_map.json": {
        "eos_token": ADDED, "pad_token": {**ADDED, "content": START}}}),
    ("added_tokens.json", removed, {}, {"added_tokens.json": BOTH}),
    ("added_tokens.json and names", removed, {}, {"added_tokens.json": BOTH, "special_tokens_map.json": MAP}),
    ("a list that replaces the flags of a name", moved, {"extra_special_tokens": [START, END]}, {
        "special_tokens_map.json": {"eos_token": {**ADDED, "lstrip": True, "rstrip": True}}}),
    ("a padding token before the others", removed, {"extra_special_tokens": [START, END], "pad_token": START}, {}),
]


@pytest.mark.parametrize(("change", "settings", "small"), [each[1:] for each in DECLARED],
                         ids=[f"{each[0]}, {each[1].__name__}" for each in DECLARED])
def test_tokens_declared_in_small_files_are_tokens_of_the_template(
        change: Any, settings: dict[str, Any], small: dict[str, Any], make: Make, read: Formats) -> None:
    folder = make(change, small, **settings)
    found = read(folder)
    assert prompt(found) == reference(folder) == HI
    assert found.tokenizer.special_tokens.items() >= BOTH.items()
    assert 260 not in prompt(found, "a<|im_end|>b")[: -len(HI[8:])]
    assert found.tokenizer.decode([71, 260, 72]) == "hi"


def test_an_end_of_turn_without_a_declaration_is_one_token(make: Make, read: Formats) -> None:
    folder = make(moved, eos_token=END)
    found = read(folder)
    assert prompt(found) == reference(folder)
    assert prompt(found).count(260) == 1
    assert found.tokenizer.eos_id == 260


@pytest.mark.parametrize("settings", [
    {"added_tokens_decoder": DECODER}, {"eos_token": END}, {"eos_token": {"content": END}}, {}])
def test_messages_cannot_write_the_end_of_a_turn(
        settings: dict[str, Any], make: Make, read: Formats) -> None:
    found = read(make(ordinary, **settings))
    assert prompt(found) == HI
    letters = [27, 91, 72, 76, 62, 68, 77, 67, 91, 29]
    assert prompt(found, "a<|im_end|>b") == [*HI[:6], 64, *letters, 65, *HI[8:]]
    assert 259 not in prompt(found, "<|im_start|>")[1:-11]


def test_messages_cannot_write_an_end_of_turn_that_only_config_json_names(
        make: Make, registry: Registry, model_files: Callable[..., ModelFiles]) -> None:


    folder = make(ordinary, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 260}), "utf-8")
    files = dataclasses.replace(model_files(folder / "tokenizer.json"), config=folder / "config.json")
    found = read_text_format(files, registry, 261)
    assert 260 not in prompt(found, "a<|im_end|>b")
    assert found.tokenizer.encode("<|im_start|>") == [259]  # the template does not write it, so it is ordinary text


def test_text_that_the_template_searches_messages_for_stays_text(make: Make, read: Formats) -> None:
    def thinking(content: dict[str, Any]) -> None:
        ordinary(content)
        content["added_tokens"][1]["content"] = "</think>"
    template = ("{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}</think><|im_end|>"
                "{% endfor %}")
    found = read(make(thinking, template=template))
    assert prompt(found, "one</think>two") == [259, 83, 86, 78, 258, 260]


def test_a_padding_token_that_is_ordinary_text_stays_text(make: Make, read: Formats) -> None:
    found = read(make(pad_token="!", unk_token="zq"))
    assert found.tokenizer.decode(found.tokenizer.encode("zq!")) == "zq!"


def test_a_name_without_a_token_is_ignored(make: Make, read: Formats) -> None:
    found = read(make(bos_token="<s>", add_bos_token=True, pad_token="[PAD]"))
    assert (found.tokenizer.bos_id, found.tokenizer.adds_bos, found.tokenizer.vocab_size) == (None, False, 261)
    assert len(found.tokenizer.encode("[PAD]", special=True)) == 5


@pytest.mark.parametrize(("change", "settings", "small"), [each[1:] for each in DECLARED[::2]])
def test_exported_files_encode_conversations_as_the_checkpoint_does(
        change: Any, settings: dict[str, Any], small: dict[str, Any], make: Make, registry: Registry,
        model_files: Callable[..., ModelFiles]) -> None:
    files = model_files(make(change, small, **settings) / "tokenizer.json")
    content = text_content(files, registry, 261)
    assert set(content.tokenizer) == {"tokenizer.json", "tokenizer_config.json"}
    listed = json.loads(content.tokenizer["tokenizer.json"])["added_tokens"]
    assert {each["content"]: each["id"] for each in listed if each["special"]}.items() >= BOTH.items()
    assert prompt(text_format_of(content, registry)) == HI


LONG = "x" * 1001
DAMAGED: list[tuple[str, Any]] = [
    ("special_tokens_map.json", {"eos_token": 5}), ("special_tokens_map.json", {"eos_token": ["x"]}),
    ("special_tokens_map.json", {"eos_token": {"text": "x"}}), ("special_tokens_map.json", [1]),
    ("special_tokens_map.json", {"additional_special_tokens": "<|im_end|>"}),
    ("special_tokens_map.json", {"additional_special_tokens": [5]}),
    ("special_tokens_map.json", {"extra_special_tokens": {"a": [1]}}),
    ("special_tokens_map.json", {"additional_special_tokens": ["x"] * 100_001}),
    ("special_tokens_map.json", {"eos_token": LONG}),
    ("added_tokens.json", {"a": "1"}), ("added_tokens.json", {"a": True}), ("added_tokens.json", {"a": 1e3}),
    ("added_tokens.json", {"<a>": -1}), ("added_tokens.json", {"<a>": 99_999}), ("added_tokens.json", {"<a>": 10**12}),
    ("added_tokens.json", {"<a>": 261, "<b>": 261}), ("added_tokens.json", {LONG: 261}),
    ("added_tokens.json", {f"<{number}>": number for number in range(100_001)}), ("added_tokens.json", []),
    ("tokenizer_config.json", {"added_tokens_decoder": {"99999": entry("<a>")}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"99999999": entry("<a>")}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"261": "<a>"}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [entry("<a>")]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"261": entry(LONG)}}),
    ("tokenizer_config.json", {"extra_special_tokens": ["\ud800"]}), ("added_tokens.json", {"\ud800": 261}),
    ("tokenizer_config.json", {"extra_special_tokens": 7}), ("tokenizer_config.json", {"pad_token": 7}),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=[f"{n}-{str(c)[:40]}" for n, c in DAMAGED])
def test_damaged_small_files_are_named(name: str, content: Any, make: Make, read: Formats) -> None:
    folder = make(small={name: content})
    with pytest.raises(TorchchatError) as error:
        read(folder)
    assert name in error.value.message
    assert len(error.value.message) < 400
