"""Files that several tests look at, exported once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchchat_core.cli.main import main

TESTDATA = Path(__file__).resolve().parents[4] / "shared" / "testdata"


@dataclass(frozen=True)
class Exported:
    """A float32 .pte file, far from a checkpoint that is no longer there."""

    model: str
    path: Path


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> int:
    """The command line in this process; its exit status."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def torchchat(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run(*arguments)
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def testdata() -> Path:
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    return TESTDATA


@pytest.fixture(scope="session")
def checkpoint(testdata: Path) -> Callable[[str], Path]:
    """The folder of a real model."""
    return lambda name: testdata / "hf" / name


@pytest.fixture(scope="session", params=["stories260K", "TinyStories-656K"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
             checkpoint: Callable[[str], Path]) -> Exported:
    folder = tmp_path_factory.mktemp("made")
    copied = shutil.copytree(checkpoint(request.param), folder / request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("TORCHCHAT_CONFIG", str(folder / "no-config.toml"))
        assert run("export", copied, "--output-pte-path", folder / "model.pte", "-d", "fp32") == 0
    moved = (folder / "model.pte").rename(tmp_path_factory.mktemp("moved") / "model.pte")
    shutil.rmtree(folder)
    return Exported(request.param, moved)
