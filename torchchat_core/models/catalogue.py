"""The models that can be had by a short name: catalog.json, as it comes with torchchat."""

from __future__ import annotations

import functools
from pathlib import Path

from torchchat_core.small_files import read_json
from torchchat_core.specs import CatalogueEntry

# The example in help, hints and documentation: a small, ungated instruct model that all recipes can quantize.
STARTING_MODEL = "qwen3-0.6b"
CATALOGUE = Path(__file__).with_name("catalog.json")


@functools.cache
def load_catalogue() -> tuple[CatalogueEntry, ...]:
    """Every entry, in the order in which `torchchat list` shows them."""
    return tuple(CatalogueEntry(**{**entry, "files": tuple(entry.get("files", ()))})
                 for entry in read_json(CATALOGUE)["models"])
