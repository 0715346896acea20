"""Which distribution provides what, for hints about plugins that are not installed.

The list is a data file. Nothing else in core names a plugin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

LIST = Path(__file__).parent / "data" / "known_plugins.json"

# What a plugin may provide: names of commands, executors and exporters, what executors read ("module" or the kind of an
# exported file), endings that exporters write, flags of `export`, formats of model files, and quantization schemes.
Offer = Literal["commands", "executors", "exporters", "reads", "writes", "formats", "schemes", "flags"]


@cache
def known_plugins() -> tuple[dict[str, Any], ...]:
    """Return the entries of the data file, the first choice first."""
    return tuple(json.loads(LIST.read_text(encoding="utf-8")))


def providers(offer: Offer, name: str | None = None) -> list[str]:
    """Return the distributions that provide `name`, or anything of that kind without a name; the first choice first."""
    return [entry["distribution"] for entry in known_plugins()
            if (name in entry.get(offer, ()) if name is not None else offer in entry)]


def install_command(distributions: Iterable[str]) -> str:
    """Return the command line that installs the distributions."""
    return f"torchchat install {' '.join(distributions)}"
