from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from building import build, missing, runtimes, sanitizing
from exporting import exporter
from probing import Probe

# Kept between runs, so that only what changed is compiled; the environment variables name other places.
BUILDS = Path(__file__).resolve().parents[2] / "build"


def _folder(variable: str, name: str) -> Path:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return Path(os.environ.get(variable) or BUILDS / name)


@pytest.fixture(scope="session")
def native() -> Path:
    """The folder with `torchchat-run` and programs of native/tests that run files, with both runtimes."""
    folder = _folder("TORCHCHAT_NATIVE_BUILD", "native-tests")
    return build(folder, ["torchchat-run", "torchchat-seeds", "torchchat-turns"],
                 {"TORCHCHAT_TESTS": "ON", "CMAKE_BUILD_TYPE": "Release", **runtimes()})


@pytest.fixture(scope="session")
def sanitized() -> Path:
    """The folder with the programs of native/tests that read files and texts, with sanitizers and no runtime."""
    folder = _folder("TORCHCHAT_SANITIZED_BUILD", "native-sanitized")
    settings = sanitizing()
    if settings is None:
        pytest.skip("no compiler here has AddressSanitizer; try: apt-get install libclang-rt-14-dev, for clang 14")
    return build(folder, ["torchchat-probe", "torchchat-fuzz"], settings)


@pytest.fixture(scope="session")
def runner(native: Path) -> Path:
    return native / "torchchat-run"


@pytest.fixture(scope="session")
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    """The C++ library, part by part, with sanitizers where a compiler has them."""
    if sanitizing() is not None:
        folder: Path = request.getfixturevalue("sanitized")
    else:
        folder = build(request.getfixturevalue("native"), ["torchchat-probe"], {})
    found = Probe(folder / "torchchat-probe")
    yield found
    found.close()


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
