"""What is in a .pte file, and that it runs where nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tc_executorch.exporter import context_length
from tc_executorch.runtime import bindings
from torchchat_core.artifacts import open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.models.transformer import Transformer
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.layers import QuantizedLinear
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.specs import ExecutorInfo, ExporterInfo, ExportRequest, LoadRequest
from torchchat_core.testing.models import reference_logits, tiny_config

STOCK_RUNNER = """
import sys
import torch
from executorch.extension.llm.custom_ops import custom_ops
from executorch.kernels import quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
path, tokenizer, prompt, count = sys.argv[1:]
parts = []
config = GenerationConfig(echo=True, max_new_tokens=int(count), temperature=0.0, num_bos=1)
TextLLMRunner(path, tokenizer).generate(prompt, config, token_callback=parts.append)
open("said.txt", "w", encoding="utf-8").write("".join(parts))
"""


def prompt_and_text(testdata: Path, model: str) -> tuple[str, str]:
    """A prompt, and the golden text that begins with it."""
    golden = testdata / "golden" / model
    if model == "stories260K":
        return "One day, Tom and his dog", (golden / "runc_t0_n200_prompt_tom.txt").read_text()
    first = json.loads((golden / "greedy_ids.json").read_text())["prompts"][0]
    return first["prompt"], first.get("text", "")


def generated(path: Path, folder: Path, prompt: str, count: int) -> dict[str, object]:
    """What `torchchat generate` answers in a process and a folder of its own, with no cache and no settings."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TORCHCHAT_CONFIG": str(folder / "none.toml")}
    made = subprocess.run([sys.executable, "-m", "torchchat_core", "generate", str(path), "--prompt", prompt,
                           "--temperature", "0", "--max-new-tokens", str(count), "--json"],
                          capture_output=True, check=True, cwd=folder, env=environment)
    answer: dict[str, object] = json.loads(made.stdout)
    return answer


def test_a_fresh_process_in_another_folder_gives_the_golden_text(exported: Any, testdata: Path, tmp_path: Path) -> None:
    prompt, text = prompt_and_text(testdata, exported.model)
    answer = generated(exported.path, tmp_path, prompt, 60)
    if exported.model == "stories260K":
        assert text.startswith(prompt + str(answer["text"]))
        assert len(str(answer["text"])) > 100
    else:
        first = json.loads((testdata / "golden" / exported.model / "greedy_ids.json").read_text())["prompts"][0]
        held = len(first["prompt_ids"])
        assert answer["token_ids"] == first["ids"][held : held + 60]


def test_the_stock_runner_of_the_wheel_says_the_same(exported: Any, testdata: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="executorch.extension.llm.runner imports it")
    names = [name for name in zipfile.ZipFile(exported.path).namelist() if "/tokenizer/tokenizer." in name]
    tokenizer = tmp_path / Path(names[0]).name
    tokenizer.write_bytes(zipfile.ZipFile(exported.path).read(names[0]))
    prompt, _ = prompt_and_text(testdata, exported.model)
    subprocess.run([sys.executable, "-c", STOCK_RUNNER, str(exported.path), str(tokenizer), prompt, "40"],
                   capture_output=True, check=True, cwd=tmp_path)
    said = (tmp_path / "said.txt").read_text(encoding="utf-8")
    answer = str(generated(exported.path, tmp_path, prompt, 40)["text"])
    assert len(answer) > 50
    assert "".join(said.removeprefix(prompt).split()) == "".join(answer.split())  # it loses spaces of tokenizer.json


def test_the_program_answers_what_runners_ask(exported: Any) -> None:
    program = bindings()._load_program(str(exported.path))
    manifest = open_artifact(exported.path).manifest
    asked = {name: program.load_method(name)([]) for name in
             ("get_bos_id", "get_eos_ids", "get_max_seq_len", "get_max_context_len", "get_vocab_size", "get_n_layers",
              "use_kv_cache", "use_sdpa_with_kv_cache", "enable_dynamic_shape")}
    assert manifest.text is not None
    assert asked == {
        "get_bos_id": [manifest.text.bos_id], "get_eos_ids": list(manifest.text.end_ids),
        "get_max_seq_len": [manifest.runtime["prefill_length"]], "get_max_context_len": [manifest.max_seq_length],
        "get_vocab_size": [manifest.config.vocab_size], "get_n_layers": [manifest.config.num_layers],
        "use_kv_cache": [True], "use_sdpa_with_kv_cache": [True], "enable_dynamic_shape": [True]}


def test_a_file_that_was_cut_off_is_refused(exported: Any, tmp_path: Path,
                                            torchchat: Callable[..., Any]) -> None:
    cut = tmp_path / "cut.pte"
    cut.write_bytes(exported.path.read_bytes()[:100_000])
    outcome = torchchat("generate", cut, "--prompt", "Once")
    assert outcome.code == 1
    assert "cut.pte is no file that torchchat can run" in outcome.err


def export(model: Transformer, path: Path, **more: object) -> None:
    load_registry().find(ExporterInfo, "executorch").make().export(
        ExportRequest(module=model, path=path, device="cpu", dtype="fp32", **more))  # type: ignore[arg-type]


def test_integers_and_scales_are_in_the_file_as_the_quantizer_made_them(tiny_llama: Transformer, tmp_path: Path
                                                                        ) -> None:
    read_recipe('{"embedding:int4": {}, "linear:a8w4dq": {}}', load_registry(), "cpu", "fp32").apply(tiny_llama)
    export(tiny_llama, tmp_path / "m.pte")
    content = (tmp_path / "m.pte").read_bytes()
    layers = [layer for name, layer in tiny_llama.named_modules() if isinstance(layer, QuantizedLinear)
              and not name.endswith(("q_proj", "k_proj"))]  # whose rows are in another order
    assert len(layers) >= 6
    for layer in layers:
        assert layer.values.numpy().tobytes() in content
        assert layer.scales.bfloat16().view(torch.uint8).numpy().tobytes() in content


def test_weights_stand_in_the_file_once(tiny_llama: Transformer, tmp_path: Path) -> None:
    """Although two methods, and with a tied embedding two layers, need them."""
    export(tiny_llama, tmp_path / "m.pte")
    assert (tmp_path / "m.pte").read_bytes().count(tiny_llama.lm_head.weight.numpy().tobytes()) == 1


@pytest.mark.parametrize(("recipe", "atol"), [
    ('{"linear:int8": {"layers": ["*.q_proj"]}}', 1e-4),  # keys and values in float32
    ('{"linear:int8": {"layers": ["*.q_proj", "*.k_proj", "*.up_proj"]}, '
     '"linear:a8w4dq": {"layers": ["*.v_proj"]}}', 0.05),
])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "qk_norm": True, "rope_interleaved": True}], ids=str)
def test_queries_keys_and_values_may_be_of_several_formats(
        recipe: str, atol: float, changes: dict[str, Any], make_tiny_model: Callable[..., Transformer], tmp_path: Path
) -> None:
    module = make_tiny_model(**changes)
    read_recipe(recipe, load_registry(), "cpu", "fp32").apply(module)
    export(module, tmp_path / "m.pte")
    session = load_registry().find(ExecutorInfo, "executorch").make().load(
        LoadRequest(device="cpu", dtype="fp32", artifact=tmp_path / "m.pte")).session()
    found = torch.stack([session.prefill([3, 1, 4, 1, 5]), session.decode(9)])
    assert torch.allclose(found, reference_logits(module, [3, 1, 4, 1, 5, 9])[-2:], atol=atol)


def test_windows_bound_the_length_of_sequences(make_tiny_model: Callable[..., Transformer], tmp_path: Path) -> None:
    config = tiny_config(sliding_window=6)
    assert context_length(config, None) == 6
    with pytest.raises(TorchchatError, match="see the last 6 positions"):
        context_length(config, 7)


def test_a_session_goes_on_across_methods_and_other_sessions(tiny_llama: Transformer, tmp_path: Path) -> None:
    """Scoring runs another method, with a KV cache of its own."""
    export(tiny_llama, tmp_path / "m.pte")
    model = load_registry().find(ExecutorInfo, "executorch").make().load(
        LoadRequest(device="cpu", dtype="fp32", artifact=tmp_path / "m.pte"))
    first, second = model.session(), model.session()
    first.prefill([1, 2, 3])
    second.score([9, 8])
    first.score([4, 5])
    second.decode(7)
    expected = reference_logits(tiny_llama, [1, 2, 3, 4, 5, 6])[-1]
    assert torch.allclose(first.decode(6), expected, atol=1e-4)
    assert torch.allclose(second.score([6])[0], reference_logits(tiny_llama, [9, 8, 7, 6])[-1], atol=1e-4)
    model.close()
    with pytest.raises(TorchchatError, match="closed"):
        first.decode(1)
