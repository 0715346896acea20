from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from build_native import (
    BUILD,
    NO_SANITIZERS,
    PROGRAM,
    SANITIZED_BUILD,
    SANITIZED_PROGRAMS,
    TEST_PROGRAMS,
    build,
    missing,
    release_settings,
    sanitizer_settings,
)
from exporting import exporter
from probing import Probe


def _folder(variable: str, default: Path) -> Path:
    """Return where to build; builds are kept between runs, so only what changed is compiled."""
    absent = missing()
    if absent is not None:
        pytest.skip(str(absent).replace("\n", "; "))
    return Path(os.environ.get(variable) or default)


@pytest.fixture(scope="session")
def native() -> Path:
    """The folder with `torchchat-run` and programs of native/tests that run files, with both runtimes."""
    folder = _folder("TORCHCHAT_NATIVE_BUILD", BUILD)
    return build(folder, [PROGRAM, *TEST_PROGRAMS], release_settings())


@pytest.fixture(scope="session")
def sanitized() -> Path:
    """The folder with the programs of native/tests that read files and texts, with sanitizers and no runtime."""
    folder = _folder("TORCHCHAT_SANITIZED_BUILD", SANITIZED_BUILD)
    settings = sanitizer_settings()
    if settings is None:
        pytest.skip(NO_SANITIZERS)
    return build(folder, SANITIZED_PROGRAMS, settings)


@pytest.fixture(scope="session")
def runner(native: Path) -> Path:
    return native / PROGRAM


@pytest.fixture(scope="session")
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    """The C++ library, part by part, with sanitizers where a compiler has them."""
    if sanitizer_settings() is not None:
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
