"""The distributions build as wheels and work in an environment that has them and what they declare, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {"torchchat_core": ROOT, "tc_eager": ROOT / "plugins" / "tc_eager"}


def run(*command: object, **environment: str) -> str:
    """Runs a command away from the repository and gives its output; fails with what it said."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd="/", check=False,
                          env={**clean, **environment})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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
        *wheels.values())
    return folder


def test_a_wheel_holds_the_package_and_nothing_else(wheels: dict[str, Path]) -> None:
    for name, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        assert {entry.split("/")[0] for entry in names} == {name, names[-1].split("/")[0]}
        assert f"{name}/py.typed" in names
    core = zipfile.ZipFile(wheels["torchchat_core"]).namelist()
    assert {"torchchat_core/data/embedded/model.safetensors", "torchchat_core/data/embedded/tokenizer.json",
            "torchchat_core/data/templates/llama3.jinja"} <= set(core)
    assert wheels["torchchat_core"].stat().st_size < 8_500_000


def test_the_two_wheels_alone_answer(environment: Path) -> None:
    answer = run("bash", "-c", f"echo 'Who are you?' | {environment}/bin/torchchat chat --temperature 0")
    assert "torchchat" in answer
    assert "chat" in run(environment / "bin/python", "-m", "torchchat_core", "--help")


def test_core_alone_says_which_plugin_is_missing(environment: Path) -> None:
    done = subprocess.run([environment / "bin/torchchat", "generate", "--prompt", "x"], capture_output=True, text=True,
                          check=False, env={**os.environ, "TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert (done.returncode, "try: pip install tc-eager" in done.stderr) == (1, True)


def test_what_is_installed_is_what_is_declared(environment: Path) -> None:
    assert "No broken requirements found" in run(environment / "bin/python", "-m", "pip", "check")
