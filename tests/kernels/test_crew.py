"""The threads of the decoder, by themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.build import FOLDER


@pytest.mark.parametrize("name", ["each_job_once", "fork_during_a_job"])
def test_the_crew(name: str, tmp_path: Path) -> None:
    """The programs say what of. A thread that was given a job twice would go beyond its stages."""
    try:
        compiler = kernels.find_compiler()
    except TorchchatError as error:
        pytest.skip(str(error))
    program = tmp_path / name
    sources = Path(__file__).parent / f"{name}.cpp", FOLDER / "crew.cpp"
    subprocess.run([*compiler, "-std=c++20", "-O2", "-pthread", f"-I{FOLDER}", *map(str, sources), "-o", str(program)],
                   check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
