"""What eight and four bits cost on the real models beside the repository; every scheme runs from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.cli.main import main
from torchchat_core.measure.perplexity import perplexity_of, scored_blocks
from torchchat_core.measure.text import encoded, measured_text, text_windows
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "tinystories_2MiB"


@pytest.fixture(scope="module")
def golden(testdata: Path) -> dict[str, Any]:
    """Results of the models in float64."""
    content: dict[str, Any] = json.loads((testdata / "golden/perplexity.json").read_text())
    found: dict[str, Any] = content["results"][TEXT]
    return found


def perplexity(testdata: Path, model: str | Path, recipe: str | None = None, keep_quantized: bool = False) -> float:
    request = ModelRequest(model=str(testdata / "hf" / model), quantize=recipe, keep_quantized=keep_quantized,
                           device="cpu")
    with open_model(request, load_registry()) as opened:
        tokenizer = opened.text_format.tokenizer
        windows = text_windows(encoded(measured_text(testdata / f"text/{TEXT}.txt"), tokenizer), tokenizer.bos_id)
        return perplexity_of(scored_blocks(opened.model, windows, str(recipe))).perplexity


@pytest.mark.parametrize("recipe", ["linear:int8", '{"linear:int8": {"groupsize": 32}}', "linear:a8w8dq",
                                    "embedding:int8"])
@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
def test_the_perplexity_of_eight_bits_stays_within_half_a_percent(model: str, recipe: str, testdata: Path,
                                                                  golden: dict[str, Any]) -> None:
    assert perplexity(testdata, model, recipe) == pytest.approx(golden[model.replace("-", "_")]["ppl"], rel=0.005)


# Models of a quarter and of half a million weights lose more than large ones: some 11 and 5 % (docs/quantisation.md).
@pytest.mark.parametrize(("recipe", "bound"), [("linear:int4", 0.14), ('{"linear:int4": {"asymmetric": true}}', 0.15),
                                               ("embedding:int4", 0.14)])
@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
def test_the_perplexity_of_four_bits_stays_within_a_bound(model: str, recipe: str, bound: float, testdata: Path,
                                                          golden: dict[str, Any]) -> None:
    assert perplexity(testdata, model, recipe) <= golden[model.replace("-", "_")]["ppl"] * (1 + bound)


# The layers that a Q4_0 file of llama.cpp's has in Q4_0; beside them Q8_0, and F16 where rows are no whole blocks.
@pytest.mark.parametrize(("model", "others"), [("stories260K", ["lm_head", "*.down_proj"]),
                                               ("TinyStories-656K", ["lm_head"])])
def test_four_bits_are_no_worse_than_q4_0(model: str, others: list[str], testdata: Path, tmp_path: Path) -> None:
    pytest.importorskip("tc_gguf", reason="tc-gguf is not installed")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(testdata / "hf" / model), "-o", str(tmp_path / "q4.gguf"), "--gguf-type", "q4_0"])
    assert ended.value.code == 0
    recipe = {"linear:int4": {"except": others}, "linear:int8": {"layers": ["lm_head"], "groupsize": 32},
              "embedding:int8": {"groupsize": 32}}
    theirs = perplexity(testdata, tmp_path / "q4.gguf", keep_quantized=True)
    assert perplexity(testdata, model, json.dumps(recipe)) <= theirs * 1.001  # what kernels differ by


@pytest.mark.parametrize(("model", "bound"), [("stories260K", 0.08), ("TinyStories-656K", 0.05)])
def test_gptq_loses_less_than_the_nearest_integers(model: str, bound: float, testdata: Path, tmp_path: Path,
                                                   golden: dict[str, Any]) -> None:
    """Calibrated on another part of the text than the perplexity is of."""
    text = (testdata / f"text/{TEXT}.txt").read_text(encoding="utf-8")[8000:400_000].replace("<|endoftext|>", "")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    folder = tmp_path / "gptq"
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(testdata / "hf" / model), "--quantize", '{"linear:int4": {"method": "gptq"}}',
              "--calibration", str(tmp_path / "text"), "--calibration-tokens", "8192", "-o", str(folder)])
    assert ended.value.code == 0
    found = perplexity(testdata, folder) / golden[model.replace("-", "_")]["ppl"]
    assert found < perplexity(testdata, model, "linear:int4") / golden[model.replace("-", "_")]["ppl"]
    assert found < 1 + bound


@pytest.mark.parametrize("recipe", ["linear:int8", "linear:a8w8dq", "embedding:int8", '{"embedding": {"bitwidth": 8}}',
                                    "linear:int4", "linear:a8w4dq", "embedding:int4", "mobile"])
def test_every_scheme_runs_from_the_command_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--device", "cpu", "--quantize", recipe, "--prompt", "Hello", "--max-new-tokens", "8",
              "--temperature", "0"])
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert shown.out.strip()
    assert "quantised" in shown.err
    assert " -> " in shown.err
