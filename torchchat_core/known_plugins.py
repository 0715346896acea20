"""Look up which distribution provides a feature, for hints about plugins that are not installed.

The list is a data file. Nothing else in core names a plugin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

LIST = Path(__file__).parent / "data" / "known_plugins.json"

# Features of a plugin: names of commands, executors and exporters, inputs of executors ("module" or the kind of an
# exported file), file extensions that exporters write, flags of `export`, formats of model files, quantization schemes.
Offer = Literal["commands", "executors", "exporters", "reads", "writes", "formats", "schemes", "flags"]


@cache
def known_plugins() -> tuple[dict[str, Any], ...]:
    """Return the entries of the data file, in order of preference."""
    return tuple(json.loads(LIST.read_text(encoding="utf-8")))


def providers(offer: Offer, name: str | None = None) -> list[str]:
    """Return the distributions that provide `name`, or any feature of that kind if `name` is None, preferred first."""
    return [entry["distribution"] for entry in known_plugins()
            if (name in entry.get(offer, ()) if name is not None else offer in entry)]


def install_command(distributions: Iterable[str]) -> str:
    """Return the command line that installs the distributions."""
    return f"torchchat install {' '.join(distributions)}"
