"""The command line as a person or a script meets it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchchat_core.cli.main import main

# ---- real models --------------------------------------------------------------------------------------------------


STORIES = ["tinyllamas/stories260K/stories260K.pt", "hf/stories260K", "hf/stories260K-sharded"]


@pytest.mark.parametrize("model", STORIES)
def test_greedy_text_equals_that_of_llama2_c(model: str, testdata: Path, torchchat: Any) -> None:
    done = torchchat("generate", testdata / model, "--temperature", 0, "--max-new-tokens", 200, "-d", "fp32")
    assert done.out == (testdata / "golden/stories260K/runc_t0_n200.txt").read_text()


@pytest.mark.parametrize("model", STORIES)
@pytest.mark.parametrize(("prompt", "golden", "steps"), [
    ("One day, Tom and his dog", "runc_t0_n200_prompt_tom.txt", 200),
    ('Lily\'s mom said, "Hello!" 123 é 😀', "runc_t0_n100_prompt_unicode.txt", 100),
])
def test_prompted_text_equals_that_of_llama2_c(model: str, prompt: str, golden: str, steps: int, testdata: Path,
                                               torchchat: Any) -> None:
    """llama2.c counts the prompt's tokens as steps, and does not print bytes of the emoji's byte tokens."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(str(testdata / "tinyllamas/stories260K/tok512.model"))
    new_tokens = steps - len(tokenizer.encode(prompt))
    done = torchchat("generate", testdata / model, "--prompt", prompt, "--temperature", 0, "--max-new-tokens",
                     new_tokens, "-d", "fp32")
    assert done.out.startswith(prompt)
    assert done.out.replace("😀", "") == (testdata / "golden/stories260K" / golden).read_text()


def test_greedy_tokens_equal_the_golden_ones_for_every_prompt(testdata: Path, torchchat: Any) -> None:
    golden = json.loads((testdata / "golden/TinyStories-656K/greedy_ids.json").read_text())
    for case in golden["prompts"]:
        expected = case["ids"][len(case["prompt_ids"]) :]
        done = torchchat("generate", testdata / "hf/TinyStories-656K", "--prompt", case["prompt"], "--temperature", 0,
                         "--max-new-tokens", len(expected), "-d", "fp32", "--json")
        found = json.loads(done.out)
        assert found["token_ids"] == [token for token in expected if token != 2]
        assert found["stats"]["prompt_tokens"] == len(case["prompt_ids"])


def test_json_is_one_object_with_text_ids_reason_and_figures(testdata: Path, torchchat: Any) -> None:
    done = torchchat("generate", testdata / "hf/stories260K", "--prompt", "Once", "--max-new-tokens", 8, "--seed", 0,
                     "--json")
    found = json.loads(done.out)
    assert set(found) == {"text", "token_ids", "finish_reason", "stats"}
    assert (len(found["token_ids"]), found["finish_reason"]) == (8, "length")
    assert set(found["stats"]) == {"prompt_tokens", "prefilled_tokens", "new_tokens", "ttft_s", "prefill_tps",
                                   "decode_tps", "peak_rss_bytes"}
    again = json.loads(torchchat("generate", testdata / "hf/stories260K", "--prompt", "Once", "--max-new-tokens", 8,
                                 "--seed", 0, "--json").out)
    assert again["token_ids"] == found["token_ids"]


def test_several_samples_differ_and_can_be_had_again(testdata: Path, torchchat: Any) -> None:
    def samples() -> list[str]:
        done = torchchat("generate", testdata / "hf/stories260K", "--prompt", "Once", "--max-new-tokens", 12, "--seed",
                         5, "--num-samples", 3, "--json")
        return [sample["text"] for sample in json.loads(done.out)["samples"]]

    assert samples() == samples()
    assert len(set(samples())) == 3


def test_the_prompt_comes_from_a_file_or_standard_input(testdata: Path, torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon a time\n")
    flags = ["generate", testdata / "hf/stories260K", "--temperature", 0, "--max-new-tokens", 5]
    expected = torchchat(*flags, "--prompt", "Once upon a time").out
    assert torchchat(*flags, "--prompt-file", tmp_path / "prompt.txt").out == expected
    assert torchchat(*flags, stdin=b"Once upon a time\n").out == expected
    assert "is not UTF-8" in torchchat(*flags, stdin=b"\xff\xfe").err
    assert torchchat(*flags, "--prompt", "a", "--prompt-file", "b").code == 2


def test_chat_answers_each_line_of_standard_input(testdata: Path, torchchat: Any) -> None:
    """Also with a model that was never made for it."""
    done = torchchat("chat", testdata / "hf/stories260K", "--max-new-tokens", 4, "--json", stdin=b"Hi\n\nAnd?\n")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert (done.code, len(answers)) == (0, 2)
    assert all(answer["stats"]["new_tokens"] <= 4 for answer in answers)
    assert answers[1]["stats"]["prefilled_tokens"] < answers[1]["stats"]["prompt_tokens"]


def test_the_paths_of_weights_parameters_and_tokenizer_can_be_given(testdata: Path, torchchat: Any,
                                                                    tmp_path: Path) -> None:
    shutil.copy(testdata / "hf/stories260K/model.safetensors", tmp_path / "w.safetensors")
    done = torchchat("generate", "any-name", "--checkpoint-path", tmp_path / "w.safetensors", "--params-path",
                     testdata / "hf/stories260K/config.json", "--tokenizer-path",
                     testdata / "tokenizers/../tinyllamas/stories260K/tok512.model", "--temperature", 0,
                     "--max-new-tokens", 200)
    assert done.out == (testdata / "golden/stories260K/runc_t0_n200.txt").read_text()


# ---- the model that comes with torchchat --------------------------------------------------------------------------


def test_parameters_that_are_given_go_before_those_inside_the_weights(testdata: Path, torchchat: Any,
                                                                      tmp_path: Path) -> None:
    model = testdata / "tinyllamas/stories260K/stories260K.pt"
    tokenizer = testdata / "tinyllamas/stories260K/tok512.model"
    params = tmp_path / "params.json"
    params.write_text(json.dumps({"dim": 64, "n_layers": 9, "n_heads": 8, "n_kv_heads": 4}))
    arguments = ["generate", str(model), "--tokenizer-path", str(tokenizer), "--prompt", "x"]
    assert torchchat(*arguments).code == 0
    refused = torchchat(*arguments, "--params-path", str(params))
    assert (refused.code, "with 9 layers" in refused.err) == (1, True)


def test_chat_without_a_model_is_the_embedded_one_and_says_what_it_is(torchchat: Any) -> None:
    done = torchchat("chat", "--temperature", 0, stdin=b"Who are you?\n")
    assert done.code == 0
    assert "torchchat" in done.out


# ---- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "expected"), [
    (["/nonexistent/model"], "there is no file or folder '/nonexistent/model': '/nonexistent' does not exist"),
    (["embeded"], "there is no model 'embeded'.*try: did you mean embedded"),
    ([""], "the name of the model is empty"),
    (["ftp://x/y"], "no installed source fetches 'ftp' references"),
    (["embedded", "--max-seq-length", "1000000"], "--max-seq-length is 1000000; the model takes 1 to"),
    (["embedded", "--tokenizer-path", "/nonexistent/t"], "--tokenizer-path: there is no file or folder"),
    (["embedded", "--params-path", "/nonexistent/t"], "--params-path: there is no file or folder"),
    (["embedded", "--adapter", "/nonexistent/t"], "--adapter: there is no file or folder"),
    (["embedded", "--prompt-file", "/nonexistent/p"], "--prompt-file: cannot read '/nonexistent/p'"),
    ([str(Path(__file__).with_name("conftest.py"))], "nothing installed opens 'conftest.py'.*try: give a .safetensors"),
    (["embedded", "--json-schema", "/nonexistent/s"], "--json-schema: /nonexistent/s cannot be read"),
    (["embedded", "--prompt", "word " * 5000], "it has to fit into"),
    (["embedded", "--raw", "--prompt", "word " * 5000], "it has to fit into"),
])
def test_wrong_input_is_one_error_and_what_to_do(arguments: list[str], expected: str, torchchat: Any) -> None:
    import re

    done = torchchat("generate", *arguments)
    assert done.code == 1
    assert done.out == ""
    assert re.search(expected, done.err.replace("\n", " ")), done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_told(torchchat: Any) -> None:
    done = torchchat("generate", "embedded", "--device", "cuda")
    assert (done.code, "no cuda device" in done.err, "try: use --device cpu" in done.err) == (1, True, True)


@pytest.mark.parametrize(("arguments", "error", "fix"), [
    (["nonsense"], "there is no command 'nonsense'", "torchchat --help"),
    (["chats"], "there is no command 'chats'", "torchchat chat\n"),
    (["run", "llama3"], "there is no command 'run'", "torchchat chat MODEL"),
    (["pull", "llama3"], "there is no command 'pull'", "torchchat download MODEL"),
    (["ps"], "there is no command 'ps'", "torchchat list --downloaded"),
    (["serve"], "there is no command 'serve'", "torchchat server MODEL"),
    (["llama-cli"], "there is no command 'llama-cli'", "torchchat chat MODEL"),
    (["embedded"], "there is no command 'embedded'", "torchchat chat embedded\n"),
    (["owner/name"], "there is no command 'owner/name'", "torchchat chat owner/name\n"),
    (["-m", "x.gguf"], "there is no option '-m' of torchchat", "MODEL without a flag: torchchat chat MODEL\n"),
    ([], "torchchat needs a command", "torchchat --help, which lists the commands\n"),
    (["config"], "torchchat config needs a command", "torchchat config --help, which lists the commands\n"),
    (["config", "set", "device=cpu"], "VALUE is missing", "torchchat config set KEY VALUE\n"),
    (["config", "set"], "KEY is missing", "torchchat config set KEY VALUE\n"),
    (["generate", "--nonsense"], "there is no option '--nonsense' of torchchat generate", "torchchat generate --help"),
    (["generate", "--temprature", "1"], "there is no option '--temprature'", "--temperature\n"),
    (["generate", "--top_k", "1"], "there is no option '--top_k'", "--top-k\n"),
    (["generate", "-m", "embedded"], "there is no option '-m'", "torchchat generate MODEL"),
    (["generate", "-n", "5"], "there is no option '-n'", "--max-new-tokens N"),
    (["generate", "--prompt"], "--prompt needs a value", "torchchat generate --help"),
    (["-p", "eager"], "-p is 'eager'; expected no:NAME", "torchchat -p no:eager COMMAND"),
    (["generate", "some words"], "there is no model 'some words'", "torchchat generate --prompt 'some words'"),
    (["generate", "embedded", "some words"], "torchchat generate takes no further argument: 'some words'",
     "torchchat generate MODEL --prompt 'some words'"),
    (["generate", "--temperature", "hot"], "--temperature is 'hot'; it has to be a number", None),
    (["generate", "--temperature", "nan"], "--temperature is nan; it has to be 0 to 100", None),
    (["generate", "--top-p", "0"], "--top-p is 0.0; it has to be above 0", None),
    (["chat", "--seed", "-1"], "--seed is -1", None),
    (["generate", "--max-new-tokens", "0"], "--max-new-tokens is '0'; expected a whole number, 1 or more", None),
    (["generate", "--max-seq-length", "0"], "--max-seq-length is '0'", None),
    (["generate", "--num-samples", "x"], "--num-samples is 'x'; expected a whole number", None),
    (["generate", "--logit-bias", "x=1"], "--logit-bias is 'x=1'; expected TOKEN=BIAS", None),
    (["generate", "--logit-bias", "1=99999"], "--logit-bias is '1=99999'; expected TOKEN=BIAS", None),
    (["generate", "--stop", ""], "--stop: a stop string is empty", None),
    (["generate", "--dtype", "fp8"], "--dtype: unknown dtype 'fp8'", None),
    (["generate", "--dtype", "int8"], "--dtype: unknown dtype 'int8'", "--quantize linear:int8"),
    (["generate", "--device", "gpu"], "--device: unknown device 'gpu'", "--device cuda\n"),
    (["generate", "--device", "metal"], "--device: unknown device 'metal'", "--device mps\n"),
    (["generate", "--device", "cuda:1"], "--device: unknown device 'cuda:1'", "CUDA_VISIBLE_DEVICES=1"),
    (["generate", "--device", "xyz"], "--device: unknown device 'xyz'", None),
    (["generate", "--executor", "eagre"], "--executor: there is no executor 'eagre'", "did you mean eager"),
    (["generate", "--quantize", "linear:int9"], "--quantize: there is no recipe, file or scheme", "linear:int8"),
    (["generate", "--quantize", "q4_0"], "--quantize: there is no recipe, file or scheme 'q4_0'",
     "--quantize linear:int4"),
    (["eval", "--limit", "0"], "--limit is '0'; expected a number above 0", None),
    (["generate", "--raw", "--system", "x"], "--system and --raw exclude each other", None),
    (["generate", "--profile", "a.txt"], "--profile is 'a.txt'", None),
    (["server", "--port", "99999"], "--port is '99999'; expected a whole number from 0 to 65535", None),
    (["server", "--grace", "x"], "--grace is 'x'", None),
    (["server", "--model", "x="], "--model is 'x='", None),
    (["server", "--allow-origin", "example.org"], "--allow-origin: 'example.org' is no origin",
     "--allow-origin https://example.org\n"),
    (["server", "--allow-origin", "https://example.org/"], "--allow-origin: 'https://example.org/' is no origin",
     "--allow-origin https://example.org\n"),
    (["install", " "], "the name of a package is empty", "torchchat install PKG"),
    (["quantize", "embedded", "--compare", "nosuch"], "--compare: there is no recipe", "MODEL goes before --compare"),
    (["remove"], "MODEL is missing", "torchchat remove MODEL"),
    (["completion", "tcsh"], "SHELL: 'tcsh' is not one of", None),
    (["perplexity", "--characters", "0"], "--characters is '0'", None),
    (["verify", "embedded", "--max-difference", "-1", "bf16"], "--max-difference is '-1'", None),
    (["bench", "--plot", "a.jpg"], "--plot is 'a.jpg'", None),
])
def test_wrong_usage_exits_with_2_and_names_the_flag(arguments: list[str], error: str, fix: str | None,
                                                     torchchat: Any, monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    """The command fails before it opens a model."""
    monkeypatch.chdir(tmp_path)
    for source in ("EmbeddedSource", "LocalSource"):
        monkeypatch.setattr(f"torchchat_core.sources.local.{source}.fetch", lambda *_: pytest.fail("a model is opened"))
    done = torchchat(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {error}"), done.err
    assert fix is None or f"\ntry: {fix}" in done.err or (fix in done.err.partition("\ntry: ")[2]), done.err


def test_a_recipe_for_a_missing_device_is_named(torchchat: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    done = torchchat("generate", "embedded", "--quantize", "cuda", "--prompt", "x")
    assert (done.code, "the recipe 'cuda' needs the device cuda" in done.err) == (1, True)


def test_a_wrong_device_in_a_recipe_names_the_recipe(torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"executor": {"accelerator": "gpu"}, "linear:int8": {}}')
    done = torchchat("generate", "embedded", "--quantize", tmp_path / "r.json", "--prompt", "x")
    assert done.err.startswith("error: --quantize: unknown device 'gpu'")
    assert '"accelerator": "cuda"} in the recipe' in done.err


def test_an_error_in_a_json_schema_names_line_and_column(torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object",\n "properties": {,}}')
    done = torchchat("generate", "embedded", "--json-schema", tmp_path / "s.json", "--prompt", "x")
    assert "at line 2, column 17" in done.err
    assert "download" not in done.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchchat_core.errors import TorchchatError

    with pytest.raises(TorchchatError):
        main(["generate", "/nonexistent", "--debug", "--prompt", "x"])


def test_without_an_executor_the_command_that_installs_one_is_told(torchchat: Any) -> None:
    without = [flag for name in ("eager", "compile", "executorch", "aoti") for flag in ("-p", f"no:{name}")]
    done = torchchat(*without, "generate", "embedded", "--prompt", "x")
    assert "no installed executor runs models in memory on" in done.err
    assert "try: leave out -p no:eager" in done.err


def test_damaged_logits_are_told(testdata: Path, torchchat: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(testdata / "hf/stories260K", tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    state["model.norm.weight"].fill_(math.nan)
    save_file(state, tmp_path / "m/model.safetensors")
    assert "the model returned nan" in torchchat("generate", tmp_path / "m", "--prompt", "x").err


# ---- as a process -------------------------------------------------------------------------------------------------


def start(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "torchchat_core", *arguments], capture_output=True, text=True,
                          env={**os.environ, **changes}, check=False, timeout=120)


def test_help_is_quick_and_imports_nothing_heavy(started: Any) -> None:
    """The start takes about 2.4 times the calls of click and pluggy (tools/measure_core.py measures seconds)."""
    start = started("--help")
    assert not start.modules & {"torch", "numpy", "rich"}
    assert start.share < 2.9


def test_faulty_plugins_cost_a_line_each_and_nothing_else(tmp_path: Path, testdata: Path) -> None:
    plugins = {
        "broken": "raise RuntimeError('boom')",
        "misspelt": "from torchchat_core.hookspecs import hookimpl\n@hookimpl\ndef torchchat_executer(): return []",
        "clashing": "from torchchat_core.hookspecs import hookimpl\nfrom torchchat_core.specs import ExecutorInfo\n"
                    "@hookimpl\ndef torchchat_executors():\n"
                    "    return [ExecutorInfo(name='eager', summary='x', factory='a:b', order=1,\n"
                    "        reads=frozenset({'module'}), devices=frozenset({'cpu'}), dtypes=frozenset({'fp32'}))]",
    }
    for name, code in plugins.items():
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[torchchat.v1]\n{name} = {name}\n")
    done = start("-p", "no:compile", "generate", str(testdata / "hf/stories260K"), "--prompt", "Once",
                 "--max-new-tokens", "3", "--temperature", "0", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "Once upon a time\n")
    assert sorted(done.stderr.splitlines()) == [
        "warning: executor 'eager' is offered by clashing:eager and by tc-eager:eager; use the full name",
        "warning: plugin broken:broken is left out: RuntimeError: boom",
        "warning: plugin misspelt:misspelt is left out: there is no hook 'torchchat_executer' "
        "(did you mean torchchat_executors?)",
    ]
    assert start("--help", PYTHONPATH=str(tmp_path)).returncode == 0
    ambiguous = start("generate", str(testdata / "hf/stories260K"), "--executor", "eager", PYTHONPATH=str(tmp_path))
    assert "executor 'eager' is ambiguous: clashing:eager and tc-eager:eager" in ambiguous.stderr


def test_ctrl_c_ends_the_answer_with_130(testdata: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "torchchat_core", "generate", str(testdata / "hf/stories260K"),
                                "--prompt", "Once", "--max-new-tokens", "500", "--logit-bias", "1=-100",
                                "--logit-bias", "2=-100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               bufsize=0)
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out.endswith("\n")


def test_a_reader_that_goes_away_is_no_error(testdata: Path) -> None:
    command = f"{sys.executable} -m torchchat_core generate {testdata / 'hf/stories260K'} --prompt Once | head -c 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("Onc", "")
