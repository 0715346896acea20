"""The threads of the decoder, by themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.build import FOLDER

PROGRAM = Path(__file__).parent / "each_job_once.cpp"


def test_no_thread_is_given_a_job_twice(tmp_path: Path) -> None:
    """One that comes late to a job may meet the next one there; given that again, it would go beyond its stages."""
    try:
        compiler = kernels.find_compiler()
    except TorchchatError as error:
        pytest.skip(str(error))
    program = tmp_path / "each_job_once"
    subprocess.run([*compiler, "-std=c++20", "-O2", "-pthread", f"-I{FOLDER}", str(PROGRAM), str(FOLDER / "crew.cpp"),
                    "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
