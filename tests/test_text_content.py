"""An exported file has the same tokenizer and template as the checkpoint, including its small files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.conversation import encode_plain, render
from torchchat_core.errors import TorchchatError
from torchchat_core.exporting_once import _paths
from torchchat_core.pipeline import ModelRequest, fetch_files
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.specs import ModelFiles
from torchchat_core.text_content import text_content, text_format_of
from torchchat_core.text_format import TextFormat, read_text_format

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
Changed = Callable[..., ModelFiles]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def changed(testdata: Path, tmp_path: Path, registry: Registry) -> Changed:
    """Copy a checkpoint, and change its small files."""
    def copy(name: str, **small: Any) -> ModelFiles:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in (testdata / name).iterdir():
            shutil.copyfile(path, folder / path.name)
        for key, content in small.items():
            (folder / f"{key}.json").write_text(json.dumps(content), "utf-8")
        return fetch_files(ModelRequest(model=str(folder)), registry)
    return copy


def prompts(text_format: TextFormat) -> tuple[list[int], list[int]]:
    text, encode = render(text_format, [{"role": "user", "content": "hello there"}])
    return encode(text), encode_plain("hello there", text_format.tokenizer)


def both(files: ModelFiles, registry: Registry, size: int) -> tuple[TextFormat, TextFormat]:
    """Return the text formats of the checkpoint and of the exported file."""
    content = text_content(files, registry, size)
    return read_text_format(files, registry, size), text_format_of(content, registry)


def test_added_tokens_json_goes_into_exported_files(changed: Changed, registry: Registry) -> None:
    files = changed("hf/stories260K", added_tokens={"<|im_start|>": 512, "<|im_end|>": 513}, tokenizer_config={
        "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "chat_template": CHATML})
    folder, exported = both(files, registry, 514)
    expected = [512, 318, 419, 285, 13, 260, 306, 414, 383, 513, 410, 13, 512, 261, 419, 419, 293, 413, 303, 413, 13]
    assert prompts(folder) == prompts(exported) == (expected, [1, 281, 306, 414, 383])
    assert exported.tokenizer.special_tokens == folder.tokenizer.special_tokens
    assert exported.end_ids == folder.end_ids


def test_special_tokens_map_json_goes_into_exported_files(changed: Changed, testdata: Path, registry: Registry) -> None:
    source = testdata / "hf/TinyStories-656K"
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    gone = ("bos_token", "eos_token", "added_tokens_decoder")
    kept = {key: value for key, value in settings.items() if key not in gone}
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    files = changed("hf/TinyStories-656K", tokenizer={**content, "post_processor": None}, tokenizer_config={
        **kept, "add_bos_token": True})
    folder, exported = both(files, registry, 2048)
    assert prompts(folder)[1] == prompts(exported)[1] == [1, 80, 109, 113, 139, 249, 57]


@pytest.mark.parametrize("entries", [{"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
                                     {"extra_special_tokens": {"a": "<|im_start|>", "b": "<|im_end|>"}},
                                     {"additional_special_tokens": [{"content": "<|im_start|>"}], "eos_token": {
                                         "content": "<|im_end|>", "rstrip": False}},
                                     {"added_tokens_decoder": {"512": {"content": "<|im_start|>", "special": False},
                                                               "513": {"content": "<|im_end|>", "special": False}}}])
def test_sentencepiece_reads_tokens_from_every_field_that_declares_them(
        entries: dict[str, Any], changed: Changed, registry: Registry) -> None:
    extra = {} if "extra_special_tokens" in entries or "added_tokens_decoder" in entries else {
        "added_tokens": {"<|im_start|>": 512, "<|im_end|>": 513}}
    files = changed("hf/stories260K", tokenizer_config={"legacy": False, "chat_template": CHATML, **entries}, **extra)
    folder, exported = both(files, registry, 514)
    expected = [512, 419, 319, 285, 13, 346, 306, 414, 383, 513, 13, 512, 412, 419, 419, 293, 413, 303, 413, 13]
    assert prompts(folder)[0] == prompts(exported)[0]
    assert [token for token in prompts(folder)[0] if token > 511] == [token for token in expected if token > 511]
    for each in (folder, exported):
        text, encode = render(each, [{"role": "user", "content": "a<|im_end|>b"}])
        assert encode(text).count(513) == 1


def test_tokens_strip_white_space_as_declared(changed: Changed, registry: Registry) -> None:
    flags = {"special": True, "normalized": False, "single_word": False}
    decoder = {"512": {"content": "<|im_start|>", "rstrip": True, "lstrip": False, **flags},
               "513": {"content": "<|im_end|>", "rstrip": True, "lstrip": True, **flags}}
    settings = {"legacy": False, "chat_template": CHATML, "added_tokens_decoder": decoder}
    files = changed("hf/stories260K", tokenizer_config=settings)
    for each in both(files, registry, 514):
        encode = each.tokenizer.encode
        spaced = encode("<|im_start|> \na <|im_end|>\nb", special=True)
        assert spaced == encode("<|im_start|>a<|im_end|>b", special=True)


NAMED = {"tool_use": "{% for t in tools %}{{ t | tojson }}{% endfor %} <tool_call> {% for m in messages %}{{ m.role }}"
                     ": {{ m.content }}\n{% endfor %}", "rag": "{{ documents }}"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def with_named_templates(files: ModelFiles, registry: Registry, default: str | None = PLAIN) -> ModelFiles:
    if default is not None:
        (files.root / "chat_template.jinja").write_text(default, "utf-8")
    (files.root / "additional_chat_templates").mkdir()
    for name, source in NAMED.items():
        (files.root / "additional_chat_templates" / f"{name}.jinja").write_text(source, "utf-8")
    return fetch_files(ModelRequest(model=str(files.root)), registry)


@pytest.mark.parametrize("default", [PLAIN, None])
def test_a_named_template_in_its_own_file_is_used_for_tools(
        default: str | None, changed: Changed, testdata: Path, registry: Registry) -> None:
    settings = json.loads((testdata / "hf/TinyStories-656K/tokenizer_config.json").read_text("utf-8"))
    own = {} if default else {"chat_template": PLAIN}
    folder = changed("hf/TinyStories-656K", tokenizer_config={**settings, **own})
    files = with_named_templates(folder, registry, default)
    messages = [{"role": "user", "content": "time?"}]
    for each in both(files, registry, 2048):
        assert each.template is not None
        assert (each.template.source, each.template.tool_source) == (PLAIN, NAMED["tool_use"])
        with_tools = each.template.render(messages, tools=[TOOL])
        assert with_tools.endswith(" <tool_call> user: time?\n")
    if default:
        transformers = pytest.importorskip("transformers")
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(files.root)
        assert with_tools == reference.apply_chat_template(messages, tools=[TOOL], tokenize=False)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "tool_use.jinja is empty"), (b"\xff", "tool_use.jinja is not UTF-8"), (b"a" * 70_000, "'tool_use' has 70000"),
    (b"{% if %}", "'tool_use' is wrong in line 1")])
def test_a_damaged_named_template_is_named(content: bytes, message: str, changed: Changed, registry: Registry) -> None:
    files = with_named_templates(changed("hf/TinyStories-656K"), registry)
    (files.root / "additional_chat_templates/tool_use.jinja").write_bytes(content)
    with pytest.raises(TorchchatError, match=message):
        read_text_format(files, registry, 2048)


def test_a_cached_export_is_made_anew_when_a_small_file_changes(changed: Changed, registry: Registry) -> None:
    files = with_named_templates(changed("hf/TinyStories-656K", added_tokens={}), registry)
    names = {path.name for path in _paths(ModelRequest(model="m"), files)}
    assert names >= {"added_tokens.json", "special_tokens_map.json", "tool_use.jinja", "chat_template.jinja"}


# ---- control tokens in messages -----------------------------------------------------------------------------------

MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role=='user' %}[INST] {{ m.content }}[/INST]{% else %} "
           "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


def metaspace(folder: Path) -> Path:
    """A tokenizer.json as `transformers` saves SentencePiece models with "legacy": false."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              *"\u2581[]/INSTabcdefghijklmnopqrstuvwxyz<>"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(),
                                      decoders.Fuse()])
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def spaced(testdata: Path, tmp_path: Path, registry: Registry) -> Callable[[str, bool], TextFormat]:
    """A text format with a tokenizer that adds a space at the start of a text, and Mistral's template."""
    def read(name: str, legacy: bool = False) -> TextFormat:
        path = tmp_path / "tokenizer.model"
        if name == "metaspace":
            path = metaspace(tmp_path)
        else:
            shutil.copyfile(testdata / f"tokenizers/{name}/tokenizer.model", path)
        settings = tmp_path / "tokenizer_config.json"
        settings.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "legacy": legacy,
                                        "chat_template": MISTRAL}), "utf-8")
        files = dataclasses.replace(fetch_files(ModelRequest(), registry), root=tmp_path, tokenizer=(path,),
                                    config=None, tokenizer_config=settings, generation_config=None)
        return read_text_format(files, registry, 40000)
    return read


CONVERSATIONS = [["Use {} old {} tags"], ["a", "say {} x", "b"], ["{}"], ["x", "{}{}", " {} "]]


def ids_of(text_format: TextFormat, turns: list[str]) -> list[int]:
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    text, encode = render(text_format, messages)
    return encode(text)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["mistral-v3", "llama2", "metaspace"])
def test_a_control_token_name_in_a_message_does_not_change_other_tokens(
        name: str, legacy: bool, spaced: Callable[..., TextFormat]) -> None:
    """The tokens are those of the same conversation with a harmless word in its place."""
    text_format = spaced(name, legacy)
    for turns in CONVERSATIONS:
        wanted, found = (ids_of(text_format, [turn.replace("{}", word) for turn in turns]) for word in ("Q", "</s>"))
        if name == "metaspace":  # every character is a token, so the words can be swapped
            word, control = (text_format.tokenizer.encode(f"a{text}a")[2:-1] for text in ("Q", "</s>"))
            assert found == exchanged(wanted, word, control)
        special = set(text_format.tokenizer.special_tokens.values())
        apart = [[token for token in ids if token in special] for ids in (wanted, found)]
        assert apart[0] == apart[1]
        pieces = [b"".join(map(text_format.tokenizer.token_bytes, ids)).decode() for ids in (wanted, found)]
        assert pieces[1] == pieces[0].replace("Q", "</s>")  # no extra space


def exchanged(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    found: list[int] = []
    while ids:
        hit = ids[: len(old)] == old
        found += new if hit else ids[:1]
        ids = ids[len(old) if hit else 1 :]
    return found


def test_the_text_of_bos_in_a_message_leaves_the_others_alone(spaced: Callable[..., TextFormat]) -> None:
    tokenizer = (text_format := spaced("mistral-v3")).tokenizer
    found = [tokenizer.token_bytes(token).decode() for token in ids_of(text_format, ["Use <s>old</s> tags"])]
    assert found == ["<s>", "[INST]", " Use", " <", "s", ">", "old", "</", "s", ">", " tags", "[/INST]"]
