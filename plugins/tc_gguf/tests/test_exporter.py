"""What the exporter writes is what llama.cpp's own tools write, and comes back as it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tc_gguf.checkpoint import GgufSource
from tc_gguf.exporter import GgufExporter
from tc_gguf.file import read_gguf
from tc_gguf.options import GgufOptions
from tc_gguf.reader import GgufTokenizerReader
from torchchat_core.chat_template import ChatTemplate
from torchchat_core.conversation import render
from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import RopeScaling
from torchchat_core.models.rope_layout import half_split_rows
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import build_model
from torchchat_core.sources.local import LocalSource, files_of_single_file
from torchchat_core.specs import Checkpoint, ExportRequest, ModelFiles, ModelRef
from torchchat_core.testing.models import PROMPTS, greedy_tokens, reference_logits, seeded, tiny_config
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader, byte_level_alphabet
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceReader
from torchchat_core.tokenizers.tiktoken_file import TiktokenReader


def reference(path: Path) -> ModelRef:
    return ModelRef(text=str(path), scheme="file", location=str(path))


def opened(path: Path) -> Checkpoint:
    return GgufSource().open(files_of_single_file(reference(path), path))


def export(module: Transformer, path: Path, kind: str = "auto", files: ModelFiles | None = None,
           dtype: str = "fp32") -> Path:
    GgufExporter().export(ExportRequest(module=module, path=path, device="cpu", dtype=dtype, files=files,
                                        options=GgufOptions(gguf_type=kind)))
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, and lose much where other programs want the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exported(testdata: Path, tmp_path: Path) -> Callable[[str, str], tuple[Path, Transformer]]:
    """Exports a model of the test data in a type: the file, and the model."""

    def make(name: str, kind: str) -> tuple[Path, Transformer]:
        files = LocalSource().fetch(reference(testdata / "hf" / name))
        module = build_model(LocalSource().open(files), torch.float32)
        return export(module, tmp_path / f"{name}.gguf", kind, files), module

    return make


# ---- the same as others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_tensors_and_tokenizer_are_those_that_llama_cpp_writes(
        kind: str, exported: Callable[[str, str], tuple[Path, Transformer]], testdata: Path) -> None:
    path, _ = exported("TinyStories-656K", kind)
    own, theirs = gguf.GGUFReader(path), gguf.GGUFReader(testdata / f"gguf/TinyStories-656K-{kind.upper()}.gguf")
    tensors = [{tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors}
               for reader in (own, theirs)]
    assert tensors[0] == tensors[1]
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):  # what the reader adds: the number of keys, of which ours has two more
            assert own.fields[key].contents() == field.contents(), key


@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_weights_come_back_exactly_as_f32(name: str,
                                          exported: Callable[[str, str], tuple[Path, Transformer]]) -> None:
    path, module = exported(name, "f32")
    again = build_model(opened(path), torch.float32)
    heads = {"q_proj": module.config.num_heads, "k_proj": module.config.num_kv_heads}
    for key, weight in module.state_dict().items():
        found = again.state_dict()[key]
        count = next((number for part, number in heads.items() if part in key), None)
        assert torch.equal(weight, found if count is None else half_split_rows(found, count)), key


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_greedy_tokens_are_those_of_the_dequantised_weights(
        kind: str, exported: Callable[[str, str], tuple[Path, Transformer]], testdata: Path) -> None:
    path, _ = exported("TinyStories-656K", kind)
    models = json.loads((testdata / "golden/gguf.json").read_text("utf-8"))["models"]
    golden = models[f"TinyStories-656K-{kind.upper()}"]
    prompt, ids = golden["prompt_ids"], golden["greedy_ids"][:40]
    assert prompt + greedy_tokens(build_model(opened(path), torch.float32), prompt, 40 - len(prompt)) == ids


def test_what_was_read_from_a_gguf_file_is_written_alike(testdata: Path, tmp_path: Path) -> None:
    """Not reordered twice, with the tokenizer's keys."""
    first = testdata / "tinyllamas/stories260K/stories260K.gguf"
    files = files_of_single_file(reference(first), first)
    second = export(build_model(GgufSource().open(files), torch.float32), tmp_path / "second.gguf", "f32", files)
    tensors = [{tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
               for path in (first, second)]
    shared = tensors[0].keys() & tensors[1].keys()
    assert len(shared) == len(tensors[1])
    assert all(tensors[0][name] == tensors[1][name] for name in shared)
    assert GgufTokenizerReader().read(second, {}).encode("two  spaces") == GgufTokenizerReader().read(
        first, {}).encode("two  spaces")


# ---- architectures ------------------------------------------------------------------------------------------------

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("llama", {"sliding_window": 6}),
    "qwen2": ("qwen2", {"attention_bias": True}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 16}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5,
                            "logits_divisor": 2.0, "tied_embeddings": True}),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_come_back(name: str, interleaved: bool, tmp_path: Path) -> None:
    called, changes = ARCHITECTURES[name]
    module = seeded(tiny_config(architecture=name, rope_interleaved=interleaved, norm_eps=2**-17, **changes))
    path = export(module, tmp_path / "model.gguf")
    again = build_model(opened(path), torch.float32)
    assert read_gguf(path).text("general.architecture") == called
    assert replace(again.config, architecture=name, rope_interleaved=interleaved) == module.config
    for prompt in PROMPTS:
        torch.testing.assert_close(reference_logits(again, prompt), reference_logits(module, prompt), rtol=0, atol=1e-5)


SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_context=8192),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_context=32),
    "yarn of its own": RopeScaling(kind="yarn", factor=4.0, original_context=32, beta_fast=16.0, attention_factor=0.9),
    "longrope": RopeScaling(kind="longrope", factor=4.0, original_context=32, short_factor=(1.0, 1.1, 1.2, 1.3),
                            long_factor=(1.0, 2.0, 3.0, 4.0)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_scaling_comes_back(name: str, tmp_path: Path) -> None:
    module = seeded(tiny_config(rope_scaling=SCALINGS[name], rope_theta=500000.0))
    again = build_model(opened(export(module, tmp_path / "model.gguf")), torch.float32)
    assert again.config.max_context == module.config.max_context
    for limit in (16, 128):  # on which longrope depends
        given, expected = (reference_logits(each, range(60), limit) for each in (again, module))
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("changes", "words"), [
    ({"sliding_window": 4, "sliding_layers": (True, False)}, "a sliding window in some of its layers"),
    ({"qk_norm": True, "attention_bias": True}, "query-key norms together with biases"),
    ({"architecture": "qwen2", "sliding_window": 4}, "architecture qwen2 of GGUF files does not have"),
    ({"architecture": "qwen2", "rope_scaling": SCALINGS["longrope"]}, "longrope scaling"),
    ({"rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original_context=64)}, "dynamic NTK rope scaling"),
    ({"rope_scaling": replace(SCALINGS["yarn"], truncate=False)}, "correction range is not rounded"),
])
def test_what_gguf_has_no_words_for_is_refused(changes: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(TorchchatError, match=words):
        export(seeded(tiny_config(**changes)), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


# ---- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "type_name"), [("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16")])
def test_the_type_is_the_model_s_own_where_none_is_asked_for(dtype: str, type_name: str, tmp_path: Path) -> None:
    made = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    file = read_gguf(export(seeded(tiny_config()).to(made), tmp_path / "model.gguf", dtype=dtype))
    assert {file.tensors[name].type.name for name in ("token_embd.weight", "blk.0.ffn_up.weight")} == {type_name}
    assert file.tensors["blk.0.attn_norm.weight"].type.name == "F32"


def test_a_sliding_window_is_told_as_llama_cpp_does_not_have_it(tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    context = tiny_config().max_context
    for window, told in ((context - 1, True), (context, False), (None, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            export(seeded(tiny_config(architecture="mistral", sliding_window=window)), tmp_path / "model.gguf")
        assert (f"sees the last {window} positions, and llama.cpp attends to all of them" in caplog.text) is told


def test_matrices_with_odd_rows_become_f16_which_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        file = read_gguf(export(seeded(tiny_config()), tmp_path / "model.gguf", "q8_0"))
    assert file.tensors["blk.0.ffn_down.weight"].type.name == "F16"
    assert file.tensors["blk.0.ffn_up.weight"].type.name == "Q8_0"
    assert "2 matrices become F16 instead of Q8_0" in caplog.text


@pytest.mark.parametrize(("value", "kind", "words"), [
    (float("nan"), "f32", "'blk.0.ffn_up.weight' has values that are not finite"), (1e6, "f16", "not finite as F16"),
])
def test_values_that_a_type_cannot_hold_are_refused(value: float, kind: str, words: str, tmp_path: Path) -> None:
    module = seeded(tiny_config())
    module.model.layers[0].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(TorchchatError, match=words):
        export(module, tmp_path / "model.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_a_module_with_other_weights_is_refused(tmp_path: Path) -> None:
    module = seeded(tiny_config())
    module.model.layers[0].mlp.up_proj.register_parameter("scales", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(TorchchatError, match=r"mlp\.up_proj\.scales' has no name in GGUF files"):
        export(module, tmp_path / "model.gguf")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TorchchatError, match="cannot write"):
        export(seeded(tiny_config()), tmp_path / "missing" / "model.gguf")


# ---- tokenizers ---------------------------------------------------------------------------------------------------


def files_with(*tokenizers: Path, **more: Any) -> ModelFiles:
    settings = tokenizers[0].parent / "tokenizer_config.json"
    return ModelFiles(**{"ref": reference(tokenizers[0].parent), "format": "safetensors",
                         "root": tokenizers[0].parent, "weights": (), "tokenizer": tokenizers,
                         "tokenizer_config": settings if settings.is_file() else None, **more})


def with_tokenizer(files: ModelFiles, size: int, path: Path) -> Path:
    """A GGUF file of a tiny model with the tokenizer."""
    return export(seeded(tiny_config(vocab_size=size, hidden_size=8, num_heads=1, num_kv_heads=1)), path, "f16", files)


@pytest.mark.parametrize(("name", "reader"), [
    ("tokenizers/llama2/tokenizer.model", SentencePieceReader), ("tokenizers/phi-2/tokenizer.json", HuggingFaceReader),
    ("tinyllamas/stories260K/tok512.model", SentencePieceReader),
    ("tokenizers/mistral-v3/tokenizer.model", SentencePieceReader),
    ("hf/TinyStories-656K/tokenizer.json", HuggingFaceReader),
    ("tokenizers/llama3/tokenizer.model", TiktokenReader),
])
def test_tokenizers_come_back(name: str, reader: Callable[[], Any], testdata: Path, tmp_path: Path) -> None:
    files = files_with(testdata / name)
    settings = json.loads(files.tokenizer_config.read_text("utf-8")) if files.tokenizer_config else {}
    own = reader().read(testdata / name, settings)
    written = GgufTokenizerReader().read(with_tokenizer(files, own.vocab_size, tmp_path / "model.gguf"), {})
    golden = json.loads((testdata / "golden/tokenizers.json").read_text("utf-8"))
    for text, ids in zip(golden["strings"], golden["encodings"][name]["ids"], strict=True):
        assert written.encode(text) == ids, text
    facts = [(each.bos_id, each.eos_id, each.adds_bos, each.adds_prefix_space, each.vocab_size, each.special_tokens)
             for each in (own, written)]
    assert facts[0] == facts[1]


def test_rows_without_a_token_get_names_of_their_own(testdata: Path, tmp_path: Path) -> None:
    files = files_with(testdata / "tokenizers/phi-2/tokenizer.json")
    written = GgufTokenizerReader().read(with_tokenizer(files, 51200, tmp_path / "model.gguf"), {})
    assert (written.vocab_size, written.token_bytes(51199)) == (51200, b"[PAD51199]")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(testdata: Path, tmp_path: Path) -> None:
    with pytest.raises(TorchchatError, match="has 50295 tokens, the model only 2048"):
        with_tokenizer(files_with(testdata / "tokenizers/phi-2/tokenizer.json"), 2048, tmp_path / "model.gguf")


def test_without_files_there_is_no_tokenizer(tmp_path: Path) -> None:
    path = export(seeded(tiny_config()), tmp_path / "model.gguf")
    assert not GgufTokenizerReader().accepts(path)


CONTENT: Mapping[str, Any] = {
    "added_tokens": [{"id": 257 + number, "content": text, "special": True, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False}
                     for number, text in enumerate(("<|endoftext|>", "<|im_end|>", "<|eom_id|>"))],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
    "model": {"type": "BPE", "merges": ["h e"],
              "vocab": {text: token for token, text in enumerate([*byte_level_alphabet(), "he"])}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., ModelFiles]:
    """The files of a model with a tokenizer.json, changed as asked for, and other JSON files."""

    def make(changes: Mapping[str, Any] | None = None, **others: Any) -> ModelFiles:
        for name, content in {"tokenizer": {**CONTENT, **(changes or {})}, **others}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
        return files_with(tmp_path / "tokenizer.json",
                          **{name: tmp_path / f"{name}.json" for name in others if name != "tokenizer_config"})

    return make


def test_chat_template_and_ends_of_turns_come_back(folder: Callable[..., ModelFiles], tmp_path: Path) -> None:
    settings = {"eos_token": "<|endoftext|>", "chat_template": [
        {"name": "default", "template": "{{ messages }}<|im_end|>"}, {"name": "tool_use", "template": "{{ tools }}"}]}
    files = folder(tokenizer_config=settings, generation_config={"eos_token_id": [257, 259]})
    path = with_tokenizer(files, 260, tmp_path / "model.gguf")
    written = GgufTokenizerReader().read(path, {})
    assert (written.eos_id, written.end_ids) == (257, {258, 259})
    assert written.chat_template == settings["chat_template"]
    assert read_gguf(path).text("tokenizer.chat_template.tool_use") == "{{ tools }}"
    assert read_gguf(path).integer("tokenizer.ggml.eom_token_id") == 259


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat_folder(testdata: Path, folder: Path, **settings: Any) -> ModelFiles:
    """Write the SentencePiece model of stories260K with two ChatML tokens in added_tokens.json."""
    (folder / "tokenizer.model").write_bytes((testdata / "hf/stories260K/tokenizer.model").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 512, "<|im_end|>": 513}), "utf-8")
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **settings}), "utf-8")
    return files_with(folder / "tokenizer.model")


def conversation(files: ModelFiles, reader: Any, path: Path) -> list[int]:
    settings = json.loads(files.tokenizer_config.read_text("utf-8")) if files.tokenizer_config else {}
    template = ChatTemplate(CHATML, bos_token="<s>", eos_token="<|im_end|>")
    text_format = TextFormat(reader.read(path, settings), template, frozenset(), {})
    text, encode = render(text_format, [{"role": "user", "content": "hello there"}])
    return encode(text)


def test_legacy_sentencepiece_models_keep_the_tokens_of_conversations(
        testdata: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp gives the same tokens for the exported file."""
    files = chat_folder(testdata, tmp_path, legacy=True)
    path = with_tokenizer(files, 514, tmp_path / "x.gguf")
    expected = [512, 318, 419, 285, 13, 260, 306, 414, 383, 513, 410, 13, 512, 261, 419, 419, 293, 413, 303, 413, 13]
    assert conversation(files, SentencePieceReader(), tmp_path / "tokenizer.model") == expected
    assert conversation(files, GgufTokenizerReader(), path) == expected
    assert not caplog.records


def test_an_export_that_changes_the_tokens_of_conversations_warns(testdata: Path, tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    with_tokenizer(chat_folder(testdata, tmp_path, legacy=False), 514, tmp_path / "x.gguf")
    assert "a space after each control token" in caplog.text


def test_tokens_declared_only_in_small_files_are_exported(folder: Callable[..., ModelFiles], tmp_path: Path) -> None:
    settings = {"chat_template": CHATML, "extra_special_tokens": ["<|im_start|>"]}
    path = with_tokenizer(folder(tokenizer_config=settings), 261, tmp_path / "model.gguf")
    assert GgufTokenizerReader().read(path, {}).special_tokens["<|im_start|>"] == 260


def test_tokens_that_the_template_writes_are_written_as_control_tokens(folder: Callable[..., ModelFiles],
                                                                       tmp_path: Path) -> None:
    added = [*CONTENT["added_tokens"], {**CONTENT["added_tokens"][0], "id": 260, "content": "<|im_start|>"}]
    changes = {"added_tokens": [{**token, "special": False} for token in added]}
    files = folder(changes, tokenizer_config={"chat_template": CHATML, "eos_token": "<|endoftext|>"})
    path = with_tokenizer(files, 261, tmp_path / "model.gguf")
    written = GgufTokenizerReader().read(path, {})
    assert written.special_tokens.items() >= {"<|im_start|>": 260, "<|im_end|>": 258}.items()
    assert written.end_ids == {258}


def test_a_byte_level_vocabulary_without_merges_is_refused(folder: Callable[..., ModelFiles], tmp_path: Path) -> None:
    """llama.cpp does not load such a file either."""
    with pytest.raises(TorchchatError, match="has no merges"):
        with_tokenizer(folder({"model": {**CONTENT["model"], "merges": []}}), 260, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_nfc_is_left_out(folder: Callable[..., ModelFiles], tmp_path: Path) -> None:
    """As llama.cpp's converter does for Qwen's files; texts that are in that form already become the same ids."""
    written = GgufTokenizerReader().read(
        with_tokenizer(folder({"normalizer": {"type": "NFC"}}), 260, tmp_path / "model.gguf"), {})
    assert written.decode(written.encode("e\u0301")) == "e\u0301"


WRONG: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "of another kind": ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
                        "of the kind 'WordLevel'"),
    "changes texts": ({"normalizer": {"type": "Lowercase"}}, "changes texts by .*Lowercase"),
    "unknown way of cutting": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}]}},
        "cuts texts into words by .*no name in GGUF files"),
    "merges with spaces": ({"model": {**CONTENT["model"], "merges": [["h", " e"]],
                                      "vocab": {**CONTENT["model"]["vocab"], " e": 300, "h e": 301}}},
                           "holds the merge"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tokenizers_that_gguf_has_no_words_for_are_refused(name: str, folder: Callable[..., ModelFiles],
                                                           tmp_path: Path) -> None:
    changes, words = WRONG[name]
    with pytest.raises(TorchchatError, match=words):
        with_tokenizer(folder(changes), 400, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_that_would_encode_otherwise_is_refused(folder: Callable[..., ModelFiles], tmp_path: Path) -> None:
    """It replaces letters, which its vocabulary alone does not say."""
    pieces = ["<unk>", "\u2581", *"Helo,wrd!", "lo", "el", "ell", "ello"]
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": {text: token for token, text in enumerate(pieces)},
             "merges": ["e l", "el l", "l o", "ell o"]}
    changes = {"model": model, "added_tokens": [], "pre_tokenizer": None, "decoder": {"type": "Fuse"},
               "normalizer": {"type": "Replace", "pattern": {"String": "l"}, "content": "o"}}
    with pytest.raises(TorchchatError, match="cannot be written to a GGUF file: 'Hello, world!' would become"):
        with_tokenizer(folder(changes), len(pieces), tmp_path / "model.gguf")


def test_unigram_models_are_refused(testdata: Path, tmp_path: Path) -> None:
    whole = (testdata / "tinyllamas/stories260K/tok512.model").read_bytes()
    unigram = whole + b"\x12\x02\x18\x01"  # later fields override: trainer_spec.model_type = UNIGRAM
    (tmp_path / "tokenizer.model").write_bytes(unigram)
    with pytest.raises(TorchchatError, match="of a kind that GGUF files do not have"):
        with_tokenizer(files_with(tmp_path / "tokenizer.model"), 512, tmp_path / "model.gguf")


