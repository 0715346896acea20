"""Chat templates: the models' own give what transformers gives, the built-in ones the known formats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from torchchat_core import builtins
from torchchat_core.chat_template import ChatTemplate, end_tokens, find_chat_template
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import CORE, Registry
from torchchat_core.specs import ModelFiles, ModelRef, Tokenizer
from torchchat_core.tokenizers.loading import read_tokenizer

TEMPLATES = ["Qwen-Qwen2.5-7B-Instruct", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
             "meta-llama-Llama-3.2-3B-Instruct", "microsoft-Phi-3.5-mini-instruct",
             "mistralai-Mistral-Nemo-Instruct-2407"]


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris & \u6771"}}}]}
RESULT = {"role": "tool", "name": "weather", "content": "sunny", "tool_call_id": "abcdefghi"}
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "The <weather> \u00e9",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [said("user", "hi")],
    [said("system", " Be brief. "), said("user", " hi ")],
    [said("user", "a"), said("assistant", "b"), said("user", "c")],
    [said("system", "s"), said("user", "a"), said("assistant", " b\n"), said("user", "<c> & \"d\" \N{GRINNING FACE}")],
    [said("user", "weather?"), CALL, RESULT],
    [said("user", "weather?"), CALL, RESULT, said("assistant", "sunny"), said("user", "ok")],
    [said("user", "weather?"), {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT],
    [said("assistant", "x")],
    [said("user", "a"), said("user", "b")],
    [said("oracle", "x")],
    [],
]


@pytest.fixture(scope="module")
def tokenizer_at(testdata: Path) -> Callable[[str], Tokenizer]:
    registry = Registry()
    registry.add(builtins, "builtins", CORE)
    return lambda path: read_tokenizer(files(tokenizer=testdata / path), registry)


def files(text: str = "model", *, location: str | None = None, root: str = "/models/model",
          tokenizer: Path | None = None, chat_template: Path | None = None) -> ModelFiles:
    return ModelFiles(ref=ModelRef(text=text, scheme="file", location=location or text), format="safetensors",
                      root=Path(root), weights=(), tokenizer=(tokenizer,) if tokenizer else (),
                      chat_template=chat_template)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def rendered(source: str, **extra: Any) -> str:
    return template(source).render([said("user", "hi")], variables=extra)


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_render_as_transformers_does(name: str, testdata: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
                                                bos_token="<s>", eos_token="</s>")
    source = (testdata / "templates" / f"{name}.jinja").read_text("utf-8")
    ours = template(source)
    outcomes = set()
    for messages, tools, prompt in itertools.product(CONVERSATIONS, (None, TOOLS, []), (True, False)):
        case = (messages, tools, prompt)
        try:
            expected = peer.apply_chat_template(messages, chat_template=source, tools=tools, tokenize=False,
                                                add_generation_prompt=prompt)
        except Exception:
            outcomes.add("refused")
            with pytest.raises(TorchchatError):
                ours.render(messages, tools=tools, add_generation_prompt=prompt)
        else:
            outcomes.add("rendered")
            assert ours.render(messages, tools=tools, add_generation_prompt=prompt) == expected, case
    assert outcomes == {"refused", "rendered"}


def test_the_generation_tag_prints_what_is_inside() -> None:
    source = ("{% for m in messages %}{% generation %}\n{% set x = m.content %}<{{ x }}>{% endgeneration %}"
              "{{ x }}{% endfor %}")
    assert rendered(source) == "<hi>"


def test_loop_controls_whitespace_and_json_are_those_of_chat_templates() -> None:
    skipping = "{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
    assert rendered(skipping + "{% if i == 3 %}{% break %}{% endif %}{% endfor %}") == "13"
    assert rendered("{% if true %}\n    {% if true %}\nx\n    {% endif %}\n{% endif %}\n") == "x\n"
    assert rendered("{{ {'b': '<\u00e9>', 'a': [1]} | tojson }}") == '{"b": "<\u00e9>", "a": [1]}'
    assert rendered("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert rendered("{{ strftime_now('%Y') | int > 2000 }}") == "True"


def test_special_tokens_that_are_absent_are_undefined() -> None:
    made = ChatTemplate("{{ bos_token is defined }}", bos_token=None, eos_token="</s>")
    assert made.render([said("user", "")]) == "False"


def test_further_variables_reach_the_template() -> None:
    assert rendered("{{ date }}", date="today") == "today"


def test_raise_exception_gives_its_text() -> None:
    with pytest.raises(TorchchatError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_wrong_templates_are_refused_with_the_line() -> None:
    with pytest.raises(TorchchatError, match="wrong in line 3"):
        template("a\nb\n{% if %}")
    with pytest.raises(TorchchatError, match="failed in line 2"):
        rendered("\n{{ 1 + 'a' }}")


def test_the_template_for_tools_is_taken_where_tools_are_given() -> None:
    settings = {"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}
    found = find_chat_template(files(), settings, FakeTokenizer({}))
    assert found is not None
    assert found.render([said("user", "")]) == "plain"
    assert found.render([said("user", "")], tools=TOOLS) == "tools"


@pytest.mark.parametrize("declared", [5, [], [{"name": "rag", "template": "x"}], [{"name": "default"}], ["x"], {}])
def test_malformed_declarations_are_refused(declared: object) -> None:
    with pytest.raises(TorchchatError, match="chat_template is"):
        find_chat_template(files(), {"chat_template": declared}, FakeTokenizer({}))


def test_the_template_file_comes_before_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ bos_token }}\u00e9", "utf-8")
    found = find_chat_template(files(chat_template=path), {"chat_template": "x", "bos_token": {"content": "<b>"}},
                               FakeTokenizer({}))
    assert found is not None
    assert found.render([said("user", "")]) == "<b>\u00e9"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{% for %}"])
def test_damaged_template_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(content)
    with pytest.raises(TorchchatError):
        find_chat_template(files(chat_template=path), {}, FakeTokenizer({}))


class FakeTokenizer:
    """Has control tokens and nothing else; the first is BOS, the second EOS."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.vocab_size = 1000
        self.special_tokens = special_tokens
        self.bos_id, self.eos_id = [*special_tokens.values(), None, None][:2]
        self.adds_bos = self.adds_prefix_space = False
        self.end_ids, self.chat_template = frozenset(), None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [self.special_tokens[text]] if special and text in self.special_tokens else [ord(c) for c in text]

    def decode(self, ids: object) -> str:
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        raise NotImplementedError


LLAMA3 = FakeTokenizer({"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 2, "<|eot_id|>": 3})
LLAMA2 = FakeTokenizer({"<s>": 1, "</s>": 2})
MISTRAL3 = FakeTokenizer({"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4})


@pytest.mark.parametrize(("tokenizer", "described", "start"), [
    (LLAMA3, files("meta-llama/Meta-Llama-3-8B-Instruct"), "<|begin_of_text|><|start_header_id|>user"),
    (LLAMA3, files("llama3", location="meta-llama/Llama-3.2-1B-Instruct"), "<|begin_of_text|><|start_header_id|>user"),
    (LLAMA3, files("llama3", root="/x/Llama3.1-8B-Instruct/original"), "<|begin_of_text|><|start_header_id|>user"),
    (LLAMA2, files("meta-llama/Llama-2-7b-chat-hf"), "<s>[INST] hi [/INST]"),
    (LLAMA2, files("llama2-7b-chat"), "<s>[INST] hi [/INST]"),
    (LLAMA2, files("CodeLlama-7b-Instruct-hf"), "<s>[INST] hi [/INST]"),
    (LLAMA2, files("mistralai/Mistral-7B-Instruct-v0.2"), "<s>[INST] hi [/INST]"),
    (MISTRAL3, files("mistralai/Mistral-7B-Instruct-v0.3"), "<s>[INST] hi[/INST]"),
])
def test_instruct_models_without_a_template_get_the_built_in_one(tokenizer: Tokenizer, described: ModelFiles,
                                                                 start: str) -> None:
    found = find_chat_template(described, {}, tokenizer)
    assert found is not None
    assert found.render([said("user", "hi")]).startswith(start)


@pytest.mark.parametrize(("tokenizer", "described"), [
    (LLAMA3, files("meta-llama/Meta-Llama-3-8B")),
    (LLAMA3, files("/home/me/chat/Meta-Llama-3-8B")),
    (LLAMA3, files("/data/torchchat/Llama-3.2-1B", root="/data/torchchat")),
    (LLAMA2, files("meta-llama/Llama-2-7b-hf")),
    (LLAMA2, files("stories260K")),
    (LLAMA2, files("my-chat-model")),
    (LLAMA2, files("TinyLlama-1.1B-Chat-v1.0")),
    (LLAMA2, files("mistralai/Mistral-7B-v0.1")),
    (FakeTokenizer({"<|endoftext|>": 0}), files("phi-2-instruct-chat")),
    (FakeTokenizer({}), files("llama-2-chat")),
])
def test_base_models_and_unknown_ones_get_no_template(tokenizer: Tokenizer, described: ModelFiles) -> None:
    assert find_chat_template(described, {}, tokenizer) is None


def built_in(tokenizer: Tokenizer, name: str) -> ChatTemplate:
    found = find_chat_template(files(name), {}, tokenizer)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"])
def test_the_built_in_llama3_template_is_its_makers_one_without_dates(name: str, testdata: Path) -> None:
    theirs = ChatTemplate((testdata / "templates" / f"{name}.jinja").read_text("utf-8"),
                          bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    ours = built_in(LLAMA3, "Llama-3-8B-Instruct")
    for messages in CONVERSATIONS[1], CONVERSATIONS[3], [said("system", "s"), said("user", "u"), said("tool", "4")]:
        for prompt in (True, False):
            dated = theirs.render(messages, add_generation_prompt=prompt, variables={"date_string": "DATE"})
            if messages[-1]["role"] == "tool":  # theirs writes the results of tools as JSON
                dated = dated.replace('"4"', "4")
            assert ours.render(messages, add_generation_prompt=prompt) == dated.replace(
                "Cutting Knowledge Date: December 2023\nToday Date: DATE\n\n", "")


CHAT = [said("system", "Be kind."), said("user", "one "), said("assistant", " two"), said("user", "three")]


def test_the_built_in_llama2_template_writes_its_format() -> None:
    assert built_in(LLAMA2, "llama-2-7b-chat").render(CHAT) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\none [/INST] two </s><s>[INST] three [/INST]")


def test_the_built_in_mistral_templates_write_their_formats() -> None:
    assert built_in(LLAMA2, "Mistral-7B-Instruct-v0.1").render(CHAT[1:]) == (
        "<s>[INST] one  [/INST] two</s> [INST] three [/INST]")
    assert built_in(LLAMA2, "Mistral-7B-Instruct-v0.1").render(CHAT) == (
        "<s>[INST] Be kind.\n\none  [/INST] two</s> [INST] three [/INST]")
    assert built_in(MISTRAL3, "Mistral-7B-Instruct-v0.3").render(CHAT) == (
        "<s>[INST] one [/INST] two</s>[INST] Be kind.\n\nthree[/INST]")


@pytest.mark.parametrize(("tokenizer", "name"), [(LLAMA2, "llama-2-7b-chat"), (LLAMA2, "Mistral-7B-Instruct-v0.1"),
                                                 (MISTRAL3, "Mistral-7B-Instruct-v0.3")])
@pytest.mark.parametrize("messages", [CONVERSATIONS[8], CONVERSATIONS[7], [said("user", "a"), said("system", "b")]])
def test_built_in_templates_refuse_roles_that_do_not_alternate(tokenizer: Tokenizer, name: str,
                                                               messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TorchchatError, match="have to alternate"):
        built_in(tokenizer, name).render(messages)


def test_built_in_prompts_have_the_tokens_of_the_references(tokenizer_at: Callable[[str], Tokenizer]) -> None:
    """As Meta's chat_completion and Mistral's own library build them, turn by turn."""
    llama2 = tokenizer_at("tokenizers/llama2/tokenizer.model")
    prompt = built_in(llama2, "llama-2-7b-chat").render(CHAT[1:])
    turns = [[1, *llama2.encode("[INST] one [/INST] two "), 2], [1, *llama2.encode("[INST] three [/INST]")]]
    assert llama2.encode(prompt, special=True) == turns[0] + turns[1]

    mistral = tokenizer_at("tokenizers/mistral-v3/tokenizer.model")
    prompt = built_in(mistral, "Mistral-7B-Instruct-v0.3").render(CHAT[1:])
    assert mistral.encode(prompt, special=True) == [
        1, 3, *mistral.encode("one "), 4, *mistral.encode("two"), 2, 3, *mistral.encode("three"), 4]


def test_end_tokens_are_those_that_the_template_writes_and_the_tokenizer_has(testdata: Path) -> None:
    source = (testdata / "templates/meta-llama-Llama-3.1-8B-Instruct.jinja").read_text("utf-8")
    assert end_tokens(template(source), LLAMA3) == {3}
    assert end_tokens(template(source), FakeTokenizer({"<|eot_id|>": 7, "<|eom_id|>": 8, "</s>": 9})) == {7, 8}
    assert end_tokens(template("<|im_end|>"), LLAMA3) == frozenset()
