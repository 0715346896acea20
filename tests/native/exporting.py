"""Files to run, made when a test first asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core.cli.main import main


def exporter(folder: Path, *model: str, dtype: str = "fp32") -> Callable[[str], Path]:
    """What exports the model when a test first asks for a file of that kind."""
    def exported(kind: str) -> Path:
        path = folder / f"model.{kind}"
        if not path.exists():
            with pytest.raises(SystemExit) as ended:
                main(["export", *model, "-d", dtype, "-o", str(path)])
            assert not ended.value.code
        return path

    return exported
