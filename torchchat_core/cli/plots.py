"""Where --plot draws to."""

from __future__ import annotations

from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.png import require_matplotlib
from torchchat_core.small_files import expanded

PICTURES, PAGES = (".png",), (".html", ".htm")


def plot_path(text: str) -> Path:
    """The file that --plot names. Raises `TorchchatError` where it cannot be drawn, before anything is measured."""
    path = expanded(text)
    if is_picture(path):
        require_matplotlib()
    elif path.suffix.lower() not in PAGES:
        raise TorchchatError(f"--plot is {text!r}; what is drawn ends in {', '.join(PICTURES + PAGES)}")
    if path.is_dir():
        raise TorchchatError(f"--plot is {text!r}, which is a folder", "name a file")
    if not path.parent.is_dir():
        raise TorchchatError(f"--plot is {text!r}; there is no folder {str(path.parent)!r}", "make it first")
    return path


def is_picture(path: Path) -> bool:
    """Whether it is drawn as a picture, and not as a page."""
    return path.suffix.lower() in PICTURES
