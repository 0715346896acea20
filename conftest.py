"""Configuration of the test suite of core, plugins and apps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from torchchat_core.small_files import cache_folder, make_folder

COMPILED = ("kernels", "aoti", "compiled")  # folders of the cache for compiled code


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_test_suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the test suite its own cache folder, so that the user's has no records of files that tests export.

    Compiled code is shared with the user's cache, because compiling takes minutes.
    """
    shared = cache_folder()
    base = tmp_path_factory.mktemp("cache")
    own = base / shared.name
    own.mkdir(mode=0o700)
    for name in COMPILED:
        with contextlib.suppress(OSError):  # a cache folder that cannot be written
            make_folder(shared / name)
            (own / name).symlink_to(shared / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base))
        yield
