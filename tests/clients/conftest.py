"""Environments with client libraries, and models that call a tool and then answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_model import write_scripted_model

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = Path(os.environ.get("TORCHCHAT_CLIENTS") or ROOT / ".venv-clients")
MARKER = "12:00 by the clock"  # the tool's result
CALL = '{"name": "get_time", "arguments": {"zone": "x"}}'
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
BRACKETS = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
            "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]


def _qwen(folder: Path, template: str) -> None:
    write_scripted_model(folder, template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                         ["Ċ", f"<tool_call>\n{CALL}\n</tool_call>", "<|im_end|>"], ["Ċ", "Noon.", "<|im_end|>"],
                         MARKER)


def _llama(folder: Path, template: str) -> None:
    call = CALL.replace("arguments", "parameters")
    write_scripted_model(folder, template, HEADERS, ["Ċ", call, "<|eot_id|>"], ["Ċ", "Noon.", "<|eot_id|>"], MARKER,
                         bos="<|begin_of_text|>")


def _mistral(folder: Path, template: str) -> None:
    write_scripted_model(folder, template, BRACKETS, ["[/INST]", "[TOOL_CALLS]", f"[{CALL}]", "</s>"],
                         ["[/TOOL_RESULTS]", "Noon.", "</s>"], MARKER, bos="<s>")


FAMILIES: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "qwen": (_qwen, "Qwen-Qwen2.5-7B-Instruct"), "llama": (_llama, "meta-llama-Llama-3.1-8B-Instruct"),
    "mistral": (_mistral, "mistralai-Mistral-Nemo-Instruct-2407")}


@pytest.fixture(scope="session")
def address(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server process with a model of each family, and return its address."""
    folder = tmp_path_factory.mktemp("scripted")
    for name, (write, template) in FAMILIES.items():
        write(folder / name, (testdata / "templates" / f"{template}.jinja").read_text())
    models = [flag for name in FAMILIES for flag in ("--model", f"{name}={folder / name}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchchat_core", "server", *models, "--port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + process.stderr.read()
        yield f"{found[0]}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def drive(address: str) -> Callable[..., str]:
    """Run a driver against the server: `drive(environment, driver, *arguments)` returns its last line of output."""

    def run(environment: str, driver: str, *arguments: str) -> str:
        python = ENVIRONMENTS / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no client libraries at {ENVIRONMENTS / environment}; try: make setup-clients")
        done = subprocess.run([python, Path(__file__).parent / "drivers" / f"{driver}.py", address, *arguments],
                              capture_output=True, text=True, check=False,
                              env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"),
                                   "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1"})
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.splitlines()[-1]  # litellm prints other lines first

    return run
