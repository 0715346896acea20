"""Answers of a hub that are wrong, and settings that lead to none."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.sources import hub_fetching
from torchchat_core.sources.hub import HubSource
from torchchat_core.sources.reference import resolve
from torchchat_core.specs import ModelFiles, ModelRef

NAME = "someone/tiny"


def fetch(text: str = NAME, token: str | None = None) -> ModelFiles:
    return HubSource().fetch(ModelRef(text=text, scheme="hf", location=text.removeprefix("hf:"), token=token))


def refused(text: str = NAME, token: str | None = None) -> TorchchatError:
    with pytest.raises(TorchchatError) as caught:
        fetch(text, token)
    return caught.value


@pytest.fixture
def tiny(hub: Any, repository: Callable[..., Any], tiny_files: Callable[[int], dict[str, bytes]]) -> dict[str, bytes]:
    """The files of the repository `NAME`."""
    files = tiny_files(0)
    hub.repositories[NAME] = repository(files)
    return files


@pytest.fixture
def listed(hub: Any, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what the hub lists of model.safetensors."""

    def change(**values: Any) -> None:
        from http.server import BaseHTTPRequestHandler

        handler = next(kind for kind in BaseHTTPRequestHandler.__subclasses__() if kind.__module__ == "hub_server")
        real = handler._sibling  # type: ignore[attr-defined]

        def sibling(path: str, content: bytes, repository: Any) -> dict[str, Any]:
            found: dict[str, Any] = real(path, content, repository)
            return {**found, **values} if path == "model.safetensors" else found

        monkeypatch.setattr(handler, "_sibling", staticmethod(sibling))

    return change


# ---- what the hub lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["abc", [1], float("inf"), 1e30, -5, {"a": 1}])
def test_a_size_that_is_none_makes_a_file_one_that_is_not_there(hub: Any, listed: Callable[..., None],
                                                                size: Any) -> None:
    listed(size=size, lfs=None)
    assert "holds no checkpoint" in refused().message
    listed(size=5, lfs={"sha256": "0" * 64, "size": size, "pointerSize": 1})
    assert "holds no checkpoint" in refused().message


def test_an_answer_that_is_not_understood_is_no_matter_of_the_network(hub: Any, listed: Callable[..., None]) -> None:
    listed(lfs={"size": 5, "pointerSize": 1})
    error = refused()
    assert "what is no answer of a hub (KeyError: 'sha256')" in error.message
    assert "HF_ENDPOINT" in (error.fix or "")
    assert len(hub.requests) == 1, "it is not asked again"


def test_an_answer_that_is_no_json_is_told(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda _: "<html>")
    hub.repositories[NAME] = type("Any", (), {"private": False, "gated": False, "at": lambda *_: ("0" * 40, {})})()
    assert "what is no answer of a hub" in refused().message


def test_a_large_file_that_has_another_size_is_told(hub: Any, tiny: dict[str, bytes], listed: Callable[..., None],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(tiny["model.safetensors"])
    digest = hashlib.sha256(tiny["model.safetensors"]).hexdigest()
    listed(lfs={"sha256": digest, "size": size + 100, "pointerSize": 1})
    monkeypatch.setattr(hub_fetching, "PLAIN_HTTP_LIMIT", size)
    assert f"has {size} bytes, and the hub lists {size + 100}" in refused().message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "README.md", ".", ""])
def test_an_index_names_files_of_weights(hub: Any, tiny: dict[str, bytes], name: str) -> None:
    tiny["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    message = refused().message
    assert "which is no file of weights" in message or "outside its own folder" in message
    assert HubSource().locate(ModelRef(text=NAME, scheme="hf", location=NAME)) is None


def test_a_name_of_the_catalogue_does_not_suggest_itself(hub: Any) -> None:
    assert "did you mean" in (refused("Qwen/Qwen3-0.6").fix or "")
    assert not re.search(r"Qwen/Qwen3-0\.6B(,| or|\?)", refused("Qwen/Qwen3-0.6B").fix or "")


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["https://[::1", "notaurl", "http://:80", "ftp://x.example", "https://h:99999999"])
def test_an_endpoint_that_is_no_address_is_told(hub: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert f"HF_ENDPOINT is {endpoint!r}, which is no address of a hub" in refused().message


@pytest.mark.parametrize("token", ["ünïcode", "a b", "a\nb", "a\x07"])
def test_a_token_that_can_be_none_is_told_and_not_shown(hub: Any, tiny: dict[str, bytes], token: str) -> None:
    error = refused(token=token)
    assert "the token holds characters that no token has" in error.message
    assert token not in str(error)
    assert hub.requests == []


def test_an_empty_token_is_told(hub: Any, tiny: dict[str, bytes]) -> None:
    assert "the token is empty" in refused(token="").message


def test_a_login_that_cannot_be_read_is_told(hub: Any, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NotADirectoryError(20, "Not a directory", "/dev/null/token")

    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", fail)
    error = refused()
    assert "/dev/null/token: Not a directory" in error.message
    assert "HF_HOME" in (error.fix or "")


# ---- digests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["resolve", "blob"])
def test_a_digest_after_an_address_of_the_hub_is_compared(hub: Any, repository: Callable[..., Any], place: str,
                                                          isolated_registry: Registry) -> None:
    content = b"GGUF" + bytes(3000)
    hub.repositories[NAME] = repository({"a.gguf": content}, gated=True)
    hub.accounts = {"hf_with": {NAME}}
    digest = hashlib.sha256(content).hexdigest()
    address = f"{hub.url}/{NAME}/{place}/main/a.gguf"
    wrong = resolve(f"{address}#sha256={'0' * 64}", isolated_registry)
    assert f"its sha256 is {digest}, and {'0' * 64} was asked for" in refused(wrong.location, "hf_with").message
    assert hub.bytes_sent == 0
    found = fetch(resolve(f"{address}#sha256={digest}", isolated_registry).location, "hf_with")
    assert found.weights[0].read_bytes() == content
    assert HubSource().locate(wrong) is None
    assert HubSource().locate(resolve(address, isolated_registry)) is not None
    assert "its sha256 is" in refused(wrong.location, "hf_with").message
    assert len(HubSource().kept()) == 1  # type: ignore[arg-type]


def test_the_digest_of_a_file_that_the_hub_lists_by_another_one_is_compared(hub: Any, repository: Callable[..., Any]
                                                                            ) -> None:
    hub.repositories[NAME] = repository({"a.gguf": b"GGUF"}, large=())
    assert "is another file than the one with the sha256" in refused(f"{NAME}:a.gguf#sha256={'0' * 64}").message
    assert fetch(f"{NAME}:a.gguf#sha256={hashlib.sha256(b'GGUF').hexdigest()}").weights
