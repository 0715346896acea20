"""`torchchat quantize` by its command line: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchchat_core.cli.main import main

pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
pytest.importorskip("tc_quant_int8", reason="tc-quant-int8 is not installed")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user, and a record of products of its own; the kernels stay where they are."""
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr("torchchat_core.products.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_it_writes_a_folder_says_what_became_of_the_layers_and_records_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "small")
    assert run("quantize", "--quantize", "mobile", "--output-dir", folder) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[-1] == folder
    assert lines[0].split()[:2] == ["model.embed_tokens", "embedding:int4"]
    assert any(line.startswith("model.layers.0.* (7 layers)") and "linear:a8w4dq" in line for line in lines)
    assert "quantised 30 layers: 11.5 MB -> 1.77 MB" in shown.err
    recorded = json.loads((tmp_path / "cache" / "products.json").read_text())["products"]
    assert [(row["kind"], row["path"], row["detail"]) for row in recorded] == [
        ("quantised", folder, "embedding:int4, linear:a8w4dq")]
    assert run("generate", folder, "--device", "cpu", "--prompt", "Hello", "--max-new-tokens", "4") == 0


def test_layers_that_are_left_alone_are_told_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                             ) -> None:
    recipe = '{"linear:int4": {"except": ["lm_head"]}}'
    assert run("quantize", "--quantize", recipe, "-o", str(tmp_path / "small"), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    left = [layer for layer in shown["layers"] if layer["scheme"] is None]
    assert [(layer["name"], layer["reason"]) for layer in left] == [("lm_head", "the recipe leaves it out")]
    assert left[0]["bytes_before"] == left[0]["bytes_after"]
    assert shown["bytes_after"] < shown["bytes_before"]
    assert run("generate", "--device", "cpu", "--quantize", recipe, "--prompt", "a", "--max-new-tokens", "1") == 0
    assert "quantised 28 layers, left 1 alone (the recipe leaves it out): " in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["--quantize", "cpu"], 2, "say where to write"),
    (["-o", "OUT"], 2, "say how"),
    (["--quantize", "cpuu", "-o", "OUT"], 2, "did you mean cpu"),
    (["--quantize", "cpu", "-o", "OUT", "--calibration-tokens", "200"], 2, "--calibration FILE"),
    (["--quantize", "cpu", "-o", "OUT", "--calibration", "text"], 1, "no section of the recipe looks at"),
    (["--quantize", '{"linear:int4": {"method": "gptq"}}', "-o", "OUT"], 1, "--calibration FILE"),
    (["--quantize", '{"linear:int4": {"method": "gptq"}}', "-o", "OUT", "--calibration", "OUT"], 1, "cannot be read"),
    (["--quantize", '{"linear:int4": {"method": "gtpq"}}', "-o", "OUT"], 2, "did you mean gptq"),
    (["--quantize", "cpu", "-o", "."], 1, "exists and is not empty"),
    (["--quantize", '{"precision": {"dtype": "bf16"}}', "-o", "OUT"], 1, "quantised no layer"),
])
def test_wrong_usage_is_told(arguments: list[str], status: int, message: str, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert run("quantize", *given) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_device_is_refused_though_the_device_need_not_be_here(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--device", "tpu", "--quantize", "linear:int8"),
                  ("--quantize", '{"executor": {"accelerator": "tpu"}, "linear:int8": {}}')):
        assert run("quantize", *words, "--output-dir", str(tmp_path / "small")) == 2
        assert "unknown device 'tpu'" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_where_no_layer_can_be_quantised_the_reasons_are_told(testdata: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    model, recipe = str(testdata / "hf" / "stories260K"), '{"linear:a8w4dq": {"layers": ["*.down_proj"]}}'
    assert run("quantize", model, "--quantize", recipe, "--output-dir", str(tmp_path / "small")) == 1
    assert "its 172 columns are not a multiple of the smallest group size, 32" in capsys.readouterr().err


def test_a_group_size_that_does_not_divide_is_replaced_by_the_largest_that_does(
        testdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(testdata / "hf" / "stories260K")
    assert run("quantize", model, "--quantize", "mobile", "--output-dir", str(tmp_path / "small"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["model.layers.0.self_attn.q_proj"]["scheme"] == "linear:a8w4dq"
    assert layers["model.layers.0.self_attn.q_proj"]["reason"] == \
        "groups of 64: its 64 columns are not a multiple of 256"
    assert layers["model.layers.0.mlp.down_proj"]["scheme"] is None
    assert report["bytes_after"] < report["bytes_before"] / 2
    assert run("generate", str(tmp_path / "small"), "--prompt", "Once", "--max-new-tokens", "2") == 0


def test_a_recipe_that_makes_the_model_larger_warns(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"precision": {"dtype": "fp32"}, "linear:int8": {"layers": ["model.layers.0.self_attn.q_proj"]}}'
    assert run("generate", "embedded", "--quantize", recipe, "--prompt", "x", "--max-new-tokens", "1") == 0
    told = capsys.readouterr().err
    assert "warning: the recipe does not make the model smaller: 5.77 MB in its files, 11" in told
    assert run("generate", "embedded", "--quantize", "cpu", "--prompt", "x", "--max-new-tokens", "1") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_plugin_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in ("linear:int4", '{"linear:int4": {}}', "cpu"):
        assert run("-p", "no:quant_int4", "generate", "--quantize", recipe, "--prompt", "x") == 2
        assert "leave out -p no:quant_int4" in capsys.readouterr().err
