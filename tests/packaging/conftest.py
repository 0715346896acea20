"""The wheels of the distributions, and a fresh environment that has them and what they declare, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "plugins" / "examples"
DISTRIBUTIONS = {"torchchat_core": ROOT, "tc_eager": ROOT / "plugins" / "tc_eager",
                 "tc_compile": ROOT / "plugins" / "tc_compile", "tc_gguf": ROOT / "plugins" / "tc_gguf",
                 "tc_aoti": ROOT / "plugins" / "tc_aoti",
                 "tc_quant_int4": ROOT / "plugins" / "tc_quant_int4",
                 "tc_quant_int8": ROOT / "plugins" / "tc_quant_int8",
                 "tc_streamlit_chat": ROOT / "apps" / "streamlit_chat",
                 "tc_float8": EXAMPLES / "tc_float8", "tc_zip": EXAMPLES / "tc_zip"}
INSTALLED = ("torchchat_core", "tc_eager")


def run(*command: object, **environment: str) -> str:
    """Runs a command away from the repository and gives its output; fails with what it said."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd="/", check=False,
                          env={**clean, **environment})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def shell() -> Callable[..., str]:
    """Runs a command away from the repository and gives its output."""
    return run


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution, built from the repository."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in DISTRIBUTIONS.values():
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    return {name: next(folder.glob(f"{name}-*.whl")) for name in DISTRIBUTIONS}


@pytest.fixture(scope="session")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the two wheels and their dependencies in the tested versions."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt",
        *(wheels[name] for name in INSTALLED))
    return folder
