from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from building import build, missing, runtimes
from probing import Probe

from torchchat_core.cli.main import main

# Kept between runs, so that only what changed is compiled; TORCHCHAT_NATIVE_BUILD names another place.
FOLDER = Path(__file__).resolve().parents[2] / "build" / "native-tests"


@pytest.fixture(scope="session")
def native() -> Path:
    """The folder with `torchchat-run` and the programs of native/tests."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(os.environ.get("TORCHCHAT_NATIVE_BUILD") or FOLDER)
    return build(folder, TORCHCHAT_TESTS="ON", CMAKE_BUILD_TYPE="Release", **runtimes())


@pytest.fixture(scope="session")
def runner(native: Path) -> Path:
    return native / "torchchat-run"


@pytest.fixture(scope="session")
def probe(native: Path) -> Iterator[Probe]:
    """The C++ library, part by part."""
    found = Probe(native / "torchchat-probe")
    yield found
    found.close()


def exporter(folder: Path, *model: str) -> Callable[[str], Path]:
    """What exports the model when a test first asks for a file of that kind."""
    def exported(kind: str) -> Path:
        path = folder / f"model.{kind}"
        if not path.exists():
            with pytest.raises(SystemExit) as ended:
                main(["export", *model, "-d", "fp32", "-o", str(path)])
            assert not ended.value.code
        return path

    return exported


@pytest.fixture(scope="session")
def stories260k(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports of the 260K model by ending: "pt2", "pte"."""
    folder = testdata / "tinyllamas/stories260K"
    return exporter(tmp_path_factory.mktemp("stories260k"), "--checkpoint-path", str(folder / "stories260K.pt"),
                    "--tokenizer-path", str(folder / "tok512.model"))


@pytest.fixture(scope="session")
def tinystories(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return exporter(tmp_path_factory.mktemp("tinystories"), str(testdata / "hf/TinyStories-656K"))


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model that comes with torchchat, which has a chat template."""
    return exporter(tmp_path_factory.mktemp("embedded"))
