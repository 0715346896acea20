"""Folders named by XDG variables; relative values are ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchchat_core.settings import config_path
from torchchat_core.small_files import cache_folder, xdg_folder


@pytest.mark.parametrize("value", ["relative/folder", ".", "~/x", ""])
def test_relative_values_are_ignored(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHCHAT_CONFIG", raising=False)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path.home() / ".cache" / "torchchat"
    assert config_path() == Path.home() / ".config" / "torchchat" / "config.toml"
    assert xdg_folder("XDG_STATE_HOME") is None


def test_absolute_values_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "torchchat"
