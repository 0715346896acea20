"""Where --plot draws to."""

from __future__ import annotations

from pathlib import Path

from torchchat_core.errors import UsageError, quoted
from torchchat_core.measure.png import require_matplotlib
from torchchat_core.small_files import output_file

PICTURES, PAGES = (".png",), (".html", ".htm")


def plot_path(text: str) -> Path:
    """The file that --plot names. Raises `TorchchatError` where it cannot be drawn, before anything is measured."""
    path = output_file("--plot", text)
    if is_picture(path):
        require_matplotlib()
    elif path.suffix.lower() not in PAGES:
        raise UsageError(f"--plot is {quoted(text)}; expected a file that ends in {', '.join(PICTURES + PAGES)}")
    return path


def is_picture(path: Path) -> bool:
    """Whether it is drawn as a picture, and not as a page."""
    return path.suffix.lower() in PICTURES
