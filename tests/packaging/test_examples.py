"""The tutorial's plugins: installed from wheels beside core's, used, checked by their contracts, and removed."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "plugins" / "examples"
NAMES = ("tc_float8", "tc_zip")
Shell = Callable[..., str]


@pytest.fixture(scope="module")
def installed(environment: Path, wheels: dict[str, Path], shell: Shell) -> Iterator[Path]:
    """The environment with the examples in it; at the end, nothing of them is left."""
    torchchat = environment / "bin/torchchat"
    shell(torchchat, "install", *(wheels[name] for name in NAMES))
    yield environment
    shell(torchchat, "uninstall", "--yes", "tc-float8", "tc-zip")
    assert "float8" not in shell(torchchat, "plugins")
    assert not list(environment.rglob("tc_float8*"))
    assert not list(environment.rglob("tc_zip*"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_as_few_lines_as_the_tutorial_says(name: str) -> None:
    count = sum(len(path.read_text().splitlines()) for path in (EXAMPLES / name / name).glob("*.py"))
    assert re.search(rf"packages of .*\b{count}\b.* lines of Python", (ROOT / "docs/plugins/tutorial.md").read_text())
    assert count < 85


def test_the_tutorial_shows_the_files_as_they_are() -> None:
    tutorial = (ROOT / "docs/plugins/tutorial.md").read_text()
    shown = re.findall(r"```(?:python|toml)\n(.*?)\n```", tutorial, re.DOTALL)
    files = [path.read_text().rstrip() for path in sorted(EXAMPLES.rglob("*")) if path.suffix in (".py", ".toml")]
    assert len(shown) == 7
    assert all(block in files for block in shown)


def test_installed_examples_are_listed_and_fit(installed: Path, shell: Shell) -> None:
    listed = shell(installed / "bin/torchchat", "plugins")
    assert "tc-float8:float8 0.1.0" in listed
    assert "tc-zip:zip 0.1.0" in listed
    matrix = shell(installed / "bin/torchchat", "plugins", "--matrix")
    row = next(line for line in matrix.splitlines() if "linear:float8" in line)
    assert " ".join(row.split()) == "linear:float8 fp32, bf16, fp16 fp32, bf16, fp16 -"
    shell(installed / "bin/torchchat", "doctor", "--offline")


def test_the_quantizer_runs_in_generate(installed: Path, shell: Shell) -> None:
    def answer(*flags: str) -> str:
        return shell(installed / "bin/torchchat", "generate", "--prompt", "Who are you?", "--max-new-tokens", "60",
                     "--temperature", "3", "--seed", "1", *flags)  # hot, so that small differences show

    assert answer("--quantize", "linear:float8") != answer()
    other = answer("--quantize", '{"linear:float8": {"output_layer": true}}')
    assert other != answer("--quantize", "linear:float8")


def test_the_source_runs_in_generate(installed: Path, shell: Shell, tmp_path: Path) -> None:
    folder = Path(shell(installed / "bin/python", "-c", "import torchchat_core.sources.local as s; print(s.EMBEDDED)")
                  .strip())
    with zipfile.ZipFile(tmp_path / "guide.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    flags = ["--prompt", "Who are you?", "--temperature", "0", "--max-new-tokens", "12"]
    found = shell(installed / "bin/torchchat", "generate", f"zip:{tmp_path}/guide.zip", *flags,
                  XDG_CACHE_HOME=str(tmp_path))
    assert found == shell(installed / "bin/torchchat", "generate", *flags)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_passes_its_contract(name: str, installed: Path, shell: Shell, tmp_path: Path) -> None:
    shell(installed / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt",
          "pytest")
    shutil.copytree(EXAMPLES / name / "tests", tmp_path / "tests")
    done = shell(installed / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "tests")
    assert " passed" in done
    assert "failed" not in done
