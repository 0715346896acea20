"""What a reference to a hub means, and which files of a repository are the model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.sources.hub_reference import HubReference, parse_hub_location
from torchchat_core.sources.hub_selection import select
from torchchat_core.sources.reference import resolve

NAME = "someone/tiny"


# ---- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "meant"), [
    ("a/b", HubReference("a/b")),
    ("a/b@main", HubReference("a/b")),
    ("a/b@refs/pr/1", HubReference("a/b", "refs/pr/1")),
    ("a/b:m.gguf", HubReference("a/b", None, "m.gguf")),
    ("a/b@v1:sub/m.gguf", HubReference("a/b", "v1", "sub/m.gguf")),
    (f"a/b:m.gguf#sha256={'0' * 64}", HubReference("a/b", None, "m.gguf", "0" * 64)),
    ("a/b:m#1.gguf", HubReference("a/b", None, "m#1.gguf")),
])
def test_a_reference_names_repository_revision_and_file(text: str, meant: HubReference) -> None:
    assert parse_hub_location(text) == meant


def test_a_file_of_a_repository_can_be_named_without_the_scheme(isolated_registry: Registry) -> None:
    found = resolve("a/b@v1:sub/m.gguf", isolated_registry)
    assert (found.scheme, found.location) == ("hf", "a/b@v1:sub/m.gguf")


@pytest.mark.parametrize("text", ["", "a", "a/b/c", "../b", "a/..", "a/b--c", "a/b@../../x", "a/b@", "a/b:",
                                  "a/b:/etc/x", "a/b:../x", "a/b:x/../../y", "a/b:x\\y", "a/b:x\0", "/a/b",
                                  "a/b.git", "ä/b", "a/b@main@x", "a/b:x\x9b.gguf", "a/b:x\x7f", "a/b:\u202efugg.exe",
                                  "a/b:\u2066x"])
def test_a_reference_that_could_leave_the_cache_is_refused(text: str) -> None:
    with pytest.raises(TorchchatError):
        parse_hub_location(text)


@pytest.mark.parametrize(("url", "location"), [
    ("https://huggingface.co/a/b", "a/b"),
    ("https://huggingface.co/a/b/tree/v1", "a/b@v1"),
    ("https://huggingface.co/a/b/resolve/main/sub/m.gguf?download=true", "a/b:sub/m.gguf"),
    ("https://hf.co/a/b/blob/refs%2Fpr%2F1/m.gguf", "a/b@refs/pr/1:m.gguf"),
    (f"https://huggingface.co/a/b/blob/main/m.gguf#sha256={'AB' * 32}", f"a/b:m.gguf#sha256={'ab' * 32}"),
])
def test_addresses_of_the_hub_are_hub_references(url: str, location: str, isolated_registry: Registry,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    found = resolve(url, isolated_registry)
    assert (found.scheme, found.location) == ("hf", location)


def test_addresses_of_the_users_own_hub_are_hub_references(isolated_registry: Registry,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hub/")
    assert resolve("https://mirror.example/hub/a/b/resolve/main/m.gguf", isolated_registry).location == "a/b:m.gguf"
    assert resolve("https://huggingface.co/a/b", isolated_registry).scheme == "https"
    assert resolve("https://mirror.example/hub/files/m.gguf", isolated_registry).scheme == "https"
    assert resolve("https://mirror.example/hub/a/b", isolated_registry).location == "a/b"


def test_other_addresses_stay_addresses(isolated_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for url in ("https://example.com/a/b", "https://huggingface.co/datasets/a/b/resolve/main/m.gguf",
                "https://huggingface.co/a/b/resolve/main/m.gguf#part", "https://huggingface.co/a/b#sha256=" + "0" * 64):
        assert resolve(url, isolated_registry).scheme == "https"


# ---- which files --------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str], text: str = NAME) -> set[str]:
    selection = select(dict.fromkeys(names, 1), parse_hub_location(text))
    return {*selection.weights, *selection.companions}


def test_safetensors_are_taken_and_no_second_copy_of_the_weights() -> None:
    names = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors",
             "consolidated.00.pth", "original/consolidated.00.pth", "original/tokenizer.model", "onnx/model.onnx",
             "model.gguf", "README.md", "flax_model.msgpack", "params.json", "vocab.json", "merges.txt"]
    assert chosen(names) == {"config.json", "tokenizer.json", "model.safetensors"}


def test_every_small_file_that_belongs_to_a_model_is_taken() -> None:
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3",
             "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
    others = ["LICENSE", "additional_chat_templates/README.md"]
    assert chosen([*small, "model.safetensors", *others]) == {*small, "model.safetensors"}


def test_bin_files_are_taken_where_there_is_nothing_better() -> None:
    names = ["config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
             "pytorch_model.bin.index.json", "original/consolidated.00.pth"]
    assert chosen(names) == {"config.json", "tokenizer.model", "pytorch_model.bin.index.json"}


def test_metas_own_files_are_taken_where_there_are_no_others() -> None:
    names = ["README.md", "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"]
    assert chosen(names) == set(names[1:])


def test_metas_tokenizer_is_taken_where_there_is_no_other() -> None:
    names = ["config.json", "model.safetensors", "original/tokenizer.model", "original/consolidated.00.pth"]
    assert chosen(names) == set(names[:3])


def test_parts_of_a_tokenizer_are_taken_where_there_is_no_whole_one() -> None:
    names = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    assert chosen(names) == set(names)


def test_mistrals_own_layout_is_taken_where_it_is_the_only_one() -> None:
    names = ["consolidated.safetensors", "params.json", "tokenizer.model.v3"]
    assert chosen(names) == set(names)


def test_the_only_gguf_file_is_taken_with_all_of_its_parts() -> None:
    assert chosen(["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "config.json"]) == {
        "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}


def test_of_several_gguf_files_one_has_to_be_named() -> None:
    sizes = {"m-Q4_0.gguf": 1_500_000_000, "sub/m-Q8_0.gguf": 2_600_000_000}
    with pytest.raises(TorchchatError) as caught:
        select(sizes, HubReference(NAME))
    assert "m-Q4_0.gguf (1.5 GB), sub/m-Q8_0.gguf (2.6 GB)" in caught.value.message
    assert f"hf:{NAME}:FILE" in (caught.value.fix or "")


def test_a_named_gguf_file_is_taken_alone_and_another_kind_with_what_lies_beside_it() -> None:
    names = ["sub/m.gguf", "sub/m.safetensors", "sub/config.json", "sub/tokenizer.json", "config.json", "n.gguf"]
    assert chosen(names, f"{NAME}:sub/m.gguf") == {"sub/m.gguf"}
    assert chosen(names, f"{NAME}:sub/m.safetensors") == {"sub/m.safetensors", "sub/config.json", "sub/tokenizer.json"}


def test_a_named_part_means_all_parts_and_a_missing_one_is_told() -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert chosen(names, f"{NAME}:m-00002-of-00002.gguf") == set(names)
    with pytest.raises(TorchchatError, match=r"does not hold 'm-00002-of-00002\.gguf'"):
        chosen(names[:1], f"{NAME}:m-00001-of-00002.gguf")


def test_a_wrong_file_name_gets_near_matches() -> None:
    with pytest.raises(TorchchatError, match=r"did you mean m-Q4_K_M\.gguf"):
        chosen(["m-Q4_K_M.gguf", "other.gguf"], f"{NAME}:m-Q4_KM.gguf")
    with pytest.raises(TorchchatError, match="is no checkpoint"):
        chosen(["README.md", "m.gguf"], f"{NAME}:README.md")


def test_a_repository_without_weights_is_told() -> None:
    with pytest.raises(TorchchatError, match="holds no checkpoint"):
        chosen(["README.md", "adapter_model.safetensors"])
