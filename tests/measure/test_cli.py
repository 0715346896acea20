"""`torchchat quantize --report` and `--compare` by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.cli.quantize import spread

pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
pytest.importorskip("tc_quant_int8", reason="tc-quant-int8 is not installed")

Run = Callable[..., Any]
COMMON = ("--device", "cpu", "--executor", "eager", "--characters", "600")
GPTQ = '{"linear:int4": {"method": "gptq", "layers": ["*.0.self_attn.q_proj"]}}'
NEAREST = '{"linear:int4": {"layers": ["*.0.self_attn.q_proj"]}}'
BROKEN = '{"executor": {"accelerator": "tpu"}, "linear:int8": {}}'


@pytest.fixture(autouse=True)
def _few_runs(few_runs: None) -> None: ...


@pytest.mark.parametrize(("words", "found"), [
    ("M --compare a b c", "M --compare a --compare b --compare c"),
    ("M --compare a --compare b", "M --compare a --compare b"),
    ("--compare a b --plot f M", "--compare a --compare b --plot f M"),
    ("--compare a b -- M", "--compare a --compare b -- M"),
    ("M --compare=a -o d", "M --compare=a -o d"),
    ("M -- --compare a", "M -- --compare a"),
    ("M --compare", "M --compare"),
    ("M --report", "M --report"),
])
def test_compare_takes_every_word_up_to_the_next_option(words: str, found: str) -> None:
    assert spread(words.split()) == found.split()


def test_a_picture_that_is_a_folder_is_refused_before_anything_is_measured(torchchat: Run, tmp_path: Path) -> None:
    (tmp_path / "d.html").mkdir()
    done = torchchat("quantize", *COMMON, "--compare", "linear:int8", "--plot", str(tmp_path / "d.html"))
    assert done.code == 1
    assert "which is a folder" in done.err
    assert "perplexity" not in done.err


def test_recipes_are_compared_in_a_table(torchchat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchchat_core.cli.progress_bars.LOG_DELAY", 0.0)
    done = torchchat("quantize", *COMMON, "--compare", "linear:int8", '{"linear:int4": {"except": ["lm_head"]}}')
    assert done.code == 0
    assert "only differences between models and recipes are meaningful" in " ".join(done.out.split())
    lines = done.out.splitlines()
    assert lines[0] == "embedded:guide"
    assert "the first 600 of " in lines[1]
    heading = next(index for index, line in enumerate(lines) if line.startswith("recipe "))
    assert [line.split("  ")[0].strip() for line in lines[heading + 1 : heading + 4]] == [
        "unquantised", "linear:int8", 'linear:int4 except=["lm_head"]']
    second = next(index for index, line in enumerate(lines) if line.startswith("recipe ") and index > heading)
    assert lines[second].split() == ["recipe", "decode", "t/s", "prefill", "t/s"]
    assert any(line.startswith("left alone: ") and "lm_head" in line and "the recipe leaves it out" in line
               for line in lines)
    assert "linear:int8: perplexity" in done.err  # progress


def test_a_report_without_a_recipe_measures_all_of_them(torchchat: Run) -> None:
    done = torchchat("quantize", *COMMON, "--report", "--json")
    found = json.loads(done.out)
    names = [row["recipe"] for row in found["rows"]] + [row["recipe"] for row in found["refused"]]
    assert {"unquantised", "cpu", "mobile", "pi5", "linear:int4", "linear:int8", "embedding:int8"} < set(names)
    first, *others = found["rows"]
    assert (first["mean_kl"], first["top_1"], first["on_front"]) == (0, 1, True)
    assert all(row["mean_kl"] > 0 for row in others)
    assert found["text"]["characters"] == 600


def test_a_report_of_one_recipe_has_two_rows(torchchat: Run) -> None:
    done = torchchat("quantize", *COMMON, "--quantize", "linear:int8", "--report", "--json")
    assert [row["recipe"] for row in json.loads(done.out)["rows"]] == ["unquantised", "linear:int8"]


def test_a_folder_is_written_and_then_measured_itself(torchchat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                      ) -> None:
    from torchchat_core.quantization.recipe import Recipe

    applied: list[str] = []
    apply = Recipe.apply
    monkeypatch.setattr(Recipe, "apply", lambda self, *given: (applied.append("once"), apply(self, *given))[1])
    done = torchchat("quantize", *COMMON, "--quantize", "mobile", "-o", tmp_path / "small", "--report", "--json")
    found = json.loads(done.out)
    assert found["folder"] == str(tmp_path / "small")
    assert [row["recipe"] for row in found["report"]["rows"]] == ["unquantised", "mobile"]
    assert found["report"]["rows"][1]["bytes"] == found["bytes_after"]
    assert applied == ["once"]
    again = torchchat("quantize", *COMMON, "--compare", tmp_path / "small", "--json")
    assert json.loads(again.out)["rows"][1]["mean_kl"] == found["report"]["rows"][1]["mean_kl"]


@pytest.fixture
def calibration(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "many words.txt").write_text("The keeper of the light went up the stairs. " * 40, encoding="utf-8")
    return "--calibration", str(tmp_path / "many words.txt"), "--calibration-tokens", "160"


def test_the_calibration_text_is_given_to_the_recipes_that_look_at_one_and_told(
        torchchat: Run, calibration: tuple[str, ...]) -> None:
    done = torchchat("quantize", *COMMON, *calibration, "--compare", GPTQ, NEAREST, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["calibration"] == {"text": "many words.txt", "most_tokens": 160}
    assert [row["recipe"] for row in found["rows"]] == ["unquantised", GPTQ, NEAREST]
    assert found["rows"][1]["mean_kl"] != found["rows"][2]["mean_kl"]
    shown = torchchat("quantize", *COMMON, *calibration, "--compare", GPTQ).out
    assert "recipes that look at a text were given many words.txt, up to 160 tokens of it" in shown


def test_a_folder_made_with_a_text_is_measured_itself_and_says_what_text_it_was(
        torchchat: Run, calibration: tuple[str, ...], tmp_path: Path) -> None:
    done = torchchat("quantize", *COMMON, *calibration, "--quantize", GPTQ, "-o", tmp_path / "small", "--report",
                     "--json")
    found = json.loads(done.out)["report"]["rows"]
    assert [row["recipe"] for row in found] == ["unquantised", GPTQ]
    manifest = json.loads((tmp_path / "small/torchchat_quantisation.json").read_text())
    assert manifest["recipe"] == json.loads(GPTQ)
    assert manifest["calibration"] == {"text": "many words.txt", "tokens": 161}  # and BOS
    again = torchchat("quantize", *COMMON, "--compare", tmp_path / "small", "--json")
    assert json.loads(again.out)["rows"][1]["mean_kl"] == found[1]["mean_kl"]


def test_a_folder_made_without_a_text_is_written_beside_recipes_that_look_at_one(
        torchchat: Run, calibration: tuple[str, ...], tmp_path: Path) -> None:
    done = torchchat("quantize", *COMMON, *calibration, "--quantize", NEAREST, "-o", tmp_path / "small", "--compare",
                     GPTQ, "--json")
    assert done.code == 0
    assert [row["recipe"] for row in json.loads(done.out)["report"]["rows"]] == ["unquantised", NEAREST, GPTQ]
    assert "calibration" not in json.loads((tmp_path / "small/torchchat_quantisation.json").read_text())


def test_a_recipe_that_lacks_its_text_is_told_after_the_others_were_measured(torchchat: Run) -> None:
    done = torchchat("quantize", *COMMON, "--compare", GPTQ, NEAREST)
    assert done.code == 1
    assert "is made with a calibration text, and there is none" in done.out


def test_pictures_and_pages_are_drawn(torchchat: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = torchchat("quantize", *COMMON, "--compare", "linear:int8", "--plot", tmp_path / "a.png", "--plot",
                     tmp_path / "a.HTML")
    assert done.code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.HTML").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"drawn: {tmp_path / 'a.png'}" in done.err


def test_a_recipe_that_was_named_and_cannot_run_fails_after_the_others_were_measured(torchchat: Run) -> None:
    done = torchchat("quantize", "--executor", "eager", "--characters", "600", "--compare", BROKEN, "linear:int8")
    assert done.code == 1
    assert "not measured: " in done.out
    assert "unknown device 'tpu'" in done.out
    assert "\nlinear:int8 " in done.out


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["--plot", "a.png", "-o", "OUT", "--quantize", "cpu"], 2, "--plot goes with --report or --compare"),
    (["--executor", "eager", "-o", "OUT", "--quantize", "cpu"], 2, "--executor goes with --report or --compare"),
    (["--report", "--plot", "OUT/a.png"], 1, "there is no folder"),
    (["--report", "--plot", "a.gif"], 2, "expected a file that ends in .png, .html, .htm"),
    (["--report", "--file", "OUT"], 1, "cannot be read"),
    (["--compare", "cpu", "cpu"], 2, "cpu is to be compared twice"),
    (["--compare", "cpu", "embedded"], 2, "MODEL goes before --compare"),
    (["--compare"], 2, "--compare needs a value"),
    (["--report", "--window", "1"], 2, "--window is '1'; expected a whole number, 2 or more"),
    (["--report", "-o", "OUT"], 2, "say how"),
    (["--report", "--calibration", "OUT"], 2, "--calibration: none of the recipes looks at a text"),
    (["--compare", "cpu", "--calibration", "OUT"], 2, "--calibration: none of the recipes looks at a text"),
    (["--compare", GPTQ, "--calibration-tokens", "200"], 2, "--calibration FILE"),
])
def test_wrong_usage_is_told_before_anything_is_done(arguments: list[str], status: int, message: str, torchchat: Run,
                                                     tmp_path: Path) -> None:
    done = torchchat("quantize", *(word.replace("OUT", str(tmp_path / "out")) for word in arguments))
    assert done.code == status
    assert message in done.err
    assert done.out == ""
    assert not (tmp_path / "out").exists()
