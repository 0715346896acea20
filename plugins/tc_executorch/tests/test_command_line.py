"""`torchchat` with ExecuTorch: presets, refusals, and models that are exported when they are first run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.artifacts import open_artifact

ALONE = ("-p", "no:tc-eager", "-p", "no:tc-compile", "-p", "no:tc-aoti")  # so that nothing runs models in memory


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "no-config.toml"))


@pytest.mark.parametrize(("preset", "length"), [("android", 2048), ("ios", 1024)])
def test_a_preset_chooses_recipe_and_length(preset: str, length: int, torchchat: Callable[..., Any], tmp_path: Path,
                                            checkpoint: Callable[[str], Path]) -> None:
    model = shutil.copytree(checkpoint("stories260K"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    outcome = torchchat("export", model, "--preset", preset, "-o", tmp_path / "m.pte")
    assert outcome.code == 0, outcome.err
    manifest = open_artifact(tmp_path / "m.pte").manifest
    assert manifest.schemes == ("embedding:int4", "linear:a8w4dq")
    assert manifest.max_seq_length == length
    assert manifest.dtype == "fp32"


@pytest.mark.parametrize("preset", ["android", "ios"])
def test_a_model_that_is_shorter_than_the_preset_keeps_its_own_length(preset: str, torchchat: Callable[..., Any],
                                                                      tmp_path: Path,
                                                                      checkpoint: Callable[[str], Path]) -> None:
    outcome = torchchat("export", checkpoint("stories260K"), "--preset", preset, "-o", tmp_path / "m.pte")
    assert outcome.code == 0, outcome.err
    assert open_artifact(tmp_path / "m.pte").manifest.max_seq_length == 512


def test_flags_go_before_the_preset(torchchat: Callable[..., Any], tmp_path: Path,
                                    checkpoint: Callable[[str], Path]) -> None:
    torchchat("export", checkpoint("stories260K"), "--preset", "ios", "--quantize", "embedding:int8",
              "--max-seq-length", "64", "-o", tmp_path / "m.pte")
    manifest = open_artifact(tmp_path / "m.pte").manifest
    assert (manifest.schemes, manifest.max_seq_length) == (("embedding:int8",), 64)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--preset", "andriod"], "has no preset 'andriod'; it has android, ios"),
    (["--quantize", "linear:int4"], "does not write linear:int4"),
    (["--quantize", '{"linear:int8": {"groupsize": 32}}'], "XNNPACK has no groups of eight-bit weights"),
    (["--max-seq-length", "100000"], "--max-seq-length is 100000"),
    (["--prefill-length", "0"], "--prefill-length is 0"),
])
def test_what_cannot_be_exported_is_told_and_leaves_nothing(arguments: list[str], said: str, tmp_path: Path,
                                                            torchchat: Callable[..., Any],
                                                            checkpoint: Callable[[str], Path]) -> None:
    outcome = torchchat("export", checkpoint("stories260K"), *arguments, "-o", tmp_path / "m.pte")
    assert outcome.code == (2 if arguments[0] in ("--preset", "--prefill-length") else 1)
    assert said in outcome.err
    assert not list(tmp_path.glob("*m*.pte"))


def test_a_model_is_exported_when_it_is_first_run_and_never_again(torchchat: Callable[..., Any], tmp_path: Path,
                                                                  checkpoint: Callable[[str], Path]) -> None:
    model = shutil.copytree(checkpoint("stories260K"), tmp_path / "model")

    def answer(*flags: str) -> Any:
        return torchchat(*ALONE, "generate", model, "--prompt", "One day, Tom", "--max-new-tokens", "8",
                         "--temperature", "0", *flags)

    def kept() -> set[Path]:
        return set((tmp_path / "cache" / "torchchat" / "exported").glob("*.pte"))

    first = answer()
    assert first.code == 0, first.err
    there = {file: file.stat().st_mtime_ns for file in kept()}
    assert len(there) == 1
    second = answer()
    assert (second.out, {file: file.stat().st_mtime_ns for file in kept()}) == (first.out, there)
    answer("--quantize", "embedding:int8")
    assert len(kept()) == 2
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # who knows what is in it now
    answer()
    assert len(kept()) == 3


def test_an_executor_of_files_can_be_asked_for(torchchat: Callable[..., Any], checkpoint: Callable[[str], Path]
                                               ) -> None:
    prompt = ("--prompt", "One day, Tom", "--max-new-tokens", "8", "--temperature", "0")
    asked = torchchat("generate", checkpoint("stories260K"), "--executor", "executorch", *prompt)
    assert asked.code == 0, asked.err
    assert asked.out == torchchat("generate", checkpoint("stories260K"), "--executor", "eager", *prompt).out
