"""What a model's files say about text: end tokens, defaults, and whether the tokenizer fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core import builtins
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import CORE, Registry
from torchchat_core.specs import ModelFiles, ModelRef
from torchchat_core.text_format import TextFormat, read_text_format

Reads = Callable[..., TextFormat]


@pytest.fixture
def reads(testdata: Path, tmp_path: Path) -> Reads:
    """Reads the format of a model with a real tokenizer and the given JSON files."""
    registry = Registry()
    registry.add(builtins, "builtins", CORE)

    def read(tokenizer: str = "tinyllamas/stories260K/tok512.model", vocab_size: int = 512, name: str = "model",
             **contents: Any) -> TextFormat:
        source = testdata / tokenizer
        copy = tmp_path / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model")
        shutil.copyfile(source, copy)
        paths = {}
        for key, content in contents.items():
            paths[key] = tmp_path / f"{key}.json"
            paths[key].write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        files = ModelFiles(ref=ModelRef(text=name, scheme="file", location=str(tmp_path)), format="safetensors",
                           root=tmp_path, weights=(), tokenizer=(copy,), **paths)
        return read_text_format(files, registry, vocab_size)

    return read


def test_a_base_model_has_no_template_and_ends_at_eos(reads: Reads) -> None:
    read = reads()
    assert read.template is None
    assert read.end_ids == {1, 2}
    assert read.defaults == {}


def test_every_end_token_that_a_file_names_ends_an_answer(reads: Reads) -> None:
    read = reads(config={"eos_token_id": 5}, generation_config={"eos_token_id": [6, 7]})
    assert read.end_ids == {1, 2, 5, 6, 7}
    assert reads(config={"eos_token_id": None}).end_ids == {1, 2}


def test_a_llama3_instruct_model_of_meta_ends_at_its_turn_token(reads: Reads) -> None:
    read = reads("tokenizers/llama3/tokenizer.model", 128256, "Meta-Llama-3-8B-Instruct")
    assert read.template is not None
    assert read.end_ids == {128000, 128001, 128009}


def test_a_template_in_the_settings_gives_its_end_tokens(reads: Reads) -> None:
    settings = {"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
                "added_tokens_decoder": {"512": {"content": "<|im_end|>", "special": True}}}
    read = reads(vocab_size=520, tokenizer_config=settings)
    assert read.template is not None
    assert read.template.render([{"role": "user", "content": "hi"}]) == "<s>hi<|im_end|>"
    assert read.end_ids == {1, 2, 512}


def test_sampling_defaults_come_from_the_generation_config(reads: Reads) -> None:
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": None, "repetition_penalty": 1.1, "max_length": 5}
    assert reads(generation_config=values).defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 40,
                                                        "repetition_penalty": 1.1}
    assert reads(generation_config={**values, "do_sample": True}).defaults["temperature"] == 0.6
    assert reads(generation_config={**values, "do_sample": False}).defaults == {"temperature": 0.0}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(reads: Reads) -> None:
    with pytest.raises(TorchchatError, match="the tokenizer has 512 tokens, the model only 511"):
        reads(vocab_size=511)
    with pytest.raises(TorchchatError, match="has 601 tokens, the model only 512"):
        reads(tokenizer_config={"added_tokens_decoder": {"600": {"content": "<|x|>", "special": True}}})
    assert reads(vocab_size=2000).tokenizer.vocab_size == 512


@pytest.mark.parametrize(("contents", "message"), [
    ({"config": {"eos_token_id": 512}}, r"eos_token_id in .*config\.json is 512; token ids go from 0 to 511"),
    ({"config": {"eos_token_id": "x"}}, "eos_token_id"),
    ({"config": {"eos_token_id": True}}, "eos_token_id"),
    ({"generation_config": {"eos_token_id": [2, -1]}}, "eos_token_id"),
    ({"generation_config": {"temperature": -1}}, r"temperature is -1; .* says .*generation_config\.json"),
    ({"generation_config": {"temperature": "hot"}}, "temperature is 'hot'"),
    ({"generation_config": '{"temperature": NaN}'}, "temperature is nan"),
    ({"generation_config": {"top_p": 1.5}}, "top_p is 1.5"),
    ({"generation_config": {"top_k": 0.5}}, "top_k is 0.5"),
    ({"generation_config": {"repetition_penalty": 0}}, "repetition_penalty is 0"),
    ({"generation_config": "{"}, "generation_config.json is not JSON"),
    ({"config": "[]"}, "config.json holds a JSON list"),
    ({"tokenizer_config": ""}, "tokenizer_config.json is empty"),
    ({"tokenizer_config": {"chat_template": "{% if %}"}}, "the chat template is wrong in line 1"),
])
def test_damaged_files_and_wrong_values_are_refused(contents: dict[str, Any], message: str, reads: Reads) -> None:
    with pytest.raises(TorchchatError, match=message):
        reads(**contents)
