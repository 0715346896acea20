from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from building import build, missing  # noqa: E402
from probing import Probe  # noqa: E402

# Kept between runs, so that only what changed is compiled; TORCHCHAT_NATIVE_BUILD names another place.
FOLDER = Path(__file__).resolve().parents[2] / "build" / "native-tests"


@pytest.fixture(scope="session")
def native() -> Path:
    """The folder with `torchchat-run` and `torchchat-probe`."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(os.environ.get("TORCHCHAT_NATIVE_BUILD") or FOLDER)
    return build(folder, TORCHCHAT_TESTS="ON", TORCHCHAT_AOTI="OFF", CMAKE_BUILD_TYPE="Release")


@pytest.fixture(scope="session")
def probe(native: Path) -> Iterator[Probe]:
    """The C++ library, part by part."""
    found = Probe(native / "torchchat-probe")
    yield found
    found.close()
