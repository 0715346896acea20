"""The test suite has a cache folder of its own, and shares compiled code with the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchchat_core.kernels.build import library_path
from torchchat_core.private_cache import foreign_fault
from torchchat_core.products import products
from torchchat_core.small_files import cache_folder


def test_tests_do_not_use_the_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cache_folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert own != cache_folder()
    assert not [product for product in products() if Path(product.path).is_relative_to(own.parents[1])]


def test_compiled_code_is_shared_with_the_user() -> None:
    folder = library_path().parent
    assert foreign_fault(folder) is None
    assert folder.is_relative_to(cache_folder())
    assert not folder.resolve().is_relative_to(cache_folder().resolve())
