"""Messages truncate values from outside."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.archive import Archive
from torchchat_core.artifacts import Manifest, Target, manifest_to_json, open_artifact, write_artifact
from torchchat_core.errors import LONGEST_MESSAGE, TorchchatError, quoted, quoted_path, shortened
from torchchat_core.testing.models import tiny_config

HUGE = "ab" * 60_000
SHORT = 1000  # characters of an error line


def lines_are_short(text: str) -> bool:
    return all(len(line) < SHORT for line in text.splitlines())


def test_quoted_and_the_error_class_limit_the_length_of_messages() -> None:
    assert len(quoted(HUGE)) == 60
    assert len(quoted({HUGE: HUGE})) == 60
    assert quoted_path("/a/" + "b" * 200) == repr("/a/" + "b" * 200)
    assert len(quoted_path(HUGE)) < 310
    assert shortened("x" * 300) == "x" * 300
    error = TorchchatError(HUGE, HUGE)
    assert len(error.message) == LONGEST_MESSAGE
    assert error.message.endswith("...")
    assert len(str(error)) < 2000


@pytest.mark.parametrize("arguments", [
    ["inspect", HUGE], ["where", HUGE], ["remove", HUGE], [HUGE], ["plugins", HUGE], ["--" + HUGE],
    ["generate", "--" + HUGE, "1"], ["generate", "--temperature", HUGE], ["generate", "--dtype", HUGE],
    ["generate", "--device", HUGE], ["generate", "--executor", HUGE], ["generate", "--quantize", HUGE],
    ["generate", "--quantize", json.dumps({HUGE: {}})],
    ["generate", "--quantize", json.dumps({"linear:int4": {HUGE: 1}})],
    ["generate", "--quantize", json.dumps({"linear:int4": {"groupsize": HUGE}})],
    ["generate", "--prompt", "a", "--prompt-file", HUGE], ["generate", "--adapter", HUGE, "--prompt", "a"],
    ["generate", "--max-new-tokens", "9" * 100_000], ["config", "set", HUGE, "1"], ["config", "set", "dtype", HUGE],
    ["export", "stories15M", "-o", HUGE], ["export", "stories15M", "-o", "m." + HUGE], ["install", HUGE, "--" + HUGE],
    ["-p", HUGE, "list"], ["inspect", "hf:" + HUGE], ["inspect", "https://" + HUGE], [HUGE + ":" + HUGE, HUGE],
], ids=lambda arguments: " ".join(word[:12] for word in arguments))
def test_errors_about_arguments_are_short(arguments: list[str], torchchat: Callable[..., Any], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = torchchat(*arguments)
    assert outcome.code in (1, 2)
    assert lines_are_short(outcome.err)


@pytest.mark.parametrize("name", ["TORCHCHAT_DTYPE", "TORCHCHAT_DEVICE", "TORCHCHAT_EXECUTOR", "TORCHCHAT_MODEL",
                                  "TORCHCHAT_CONFIG", "HF_ENDPOINT", "XDG_CACHE_HOME"])
def test_errors_about_the_environment_are_short(name: str, torchchat: Callable[..., Any],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, HUGE)
    outcome = torchchat("generate", "--prompt", "a", "--max-new-tokens", "1")
    assert lines_are_short(outcome.err)


@pytest.mark.parametrize(("file", "changes"), [
    ("config.json", {"model_type": HUGE}), ("config.json", {"hidden_size": HUGE}), ("config.json", {HUGE: HUGE}),
    ("config.json", {"rope_scaling": {"rope_type": HUGE}}), ("config.json", {"rope_scaling": HUGE}),
    ("config.json", {"hidden_act": HUGE}), ("config.json", {"torch_dtype": HUGE}),
    ("config.json", {"torch_dtype": [HUGE]}),
    ("config.json", {"num_hidden_layers": 10**4000}), ("config.json", {"quantization_config": {"quant_method": HUGE}}),
    ("generation_config.json", {"temperature": HUGE}), ("generation_config.json", {"eos_token_id": [HUGE]}),
    ("tokenizer_config.json", {"chat_template": [HUGE]}),
    ("tokenizer_config.json", {"chat_template": "{% " + HUGE[:60_000]}),
    ("tokenizer_config.json", {"eos_token": {"content": [HUGE]}}), ("tokenizer_config.json", {"bos_token": HUGE}),
], ids=lambda value: value if isinstance(value, str) else str(value)[:40])
def test_errors_about_the_files_of_a_model_are_short(file: str, changes: dict[str, Any], testdata: Path, tmp_path: Path,
                                                     torchchat: Callable[..., Any]) -> None:
    folder = shutil.copytree(testdata / "hf" / "TinyStories-656K", tmp_path / "model")
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))
    outcome = torchchat("generate", folder, "--prompt", "a", "--max-new-tokens", "1")
    assert lines_are_short(outcome.err)


@pytest.mark.parametrize("changes", [{"dtype": HUGE}, {"format_version": HUGE}, {"max_seq_length": HUGE},
                                     {"config": {HUGE: HUGE}}, {"digests": {HUGE: HUGE}}, {"target": {"device": HUGE}},
                                     {"target": {"device": "cpu", "machine": HUGE}}, {"program": {"entry": HUGE}}],
                         ids=lambda changes: str(changes)[:40])
def test_errors_about_manifests_are_short(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"program")
    manifest = Manifest(kind="boxed", model="m", config=tiny_config(), dtype="fp32", max_seq_length=5,
                        target=Target(device="cpu"))

    def changed(*arguments: Any) -> dict[str, Any]:
        return {**manifest_to_json(*arguments), **changes}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchchat_core.artifacts.manifest_to_json", changed)
        write_artifact(path, manifest)
    assert Archive(path).entries

    def opened() -> None:
        artifact = open_artifact(path)
        artifact.check_target()
        artifact.check()

    with pytest.raises(TorchchatError) as raised:
        opened()
    assert len(raised.value.message) < SHORT


def gguf(metadata: bytes, count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + metadata


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize("content", [
    gguf(gguf_text(HUGE) + struct.pack("<I", 99)), gguf((gguf_text(HUGE) + struct.pack("<IB", 7, 1)) * 2, 2),
    gguf(gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text(HUGE)),
    gguf(gguf_text(HUGE) + struct.pack("<IB", 7, 9)), gguf(gguf_text(HUGE)),
], ids=["unknown type", "twice", "architecture", "no boolean", "cut off"])
def test_errors_about_gguf_files_are_short(content: bytes, tmp_path: Path, torchchat: Callable[..., Any]) -> None:
    pytest.importorskip("tc_gguf", reason="tc-gguf is not installed")
    (tmp_path / "m.gguf").write_bytes(content)
    outcome = torchchat("generate", tmp_path / "m.gguf", "--prompt", "a")
    assert outcome.code == 1
    assert lines_are_short(outcome.err)
