"""A child process imports our modules, and none from the current folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchchat_core.own_process import in_own_process
from torchchat_core.plugins import load_registry


def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "torch", "pluggy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder')")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "asked.py").write_text("def task(registry, number): return {'number': number + 1}")
    monkeypatch.syspath_prepend(str(ours))
    monkeypatch.chdir(tmp_path)
    assert in_own_process("asked:task", {"number": 1}, load_registry()) == {"number": 2}
