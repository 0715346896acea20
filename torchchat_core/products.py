"""A record of the files that were made from models on this machine, so that `torchchat list` can show them.

The files are the user's own, wherever they lie. The record only names them: a file that is gone is no longer named.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import cache_folder, make_folder, read_json, write_whole
from torchchat_core.specs import ModelRef

Kind = Literal["export", "quantised", "converted"]
RECORD = "products.json"


@dataclass(frozen=True, kw_only=True)
class Product:
    """One file or folder that was made from a model."""

    reference: str  # of the model, as `reference_of` gives it
    kind: Kind
    path: str  # absolute
    detail: str = ""  # how it was made, for people: "linear:int4, cuda, bf16"


def reference_of(ref: ModelRef) -> str:
    """The one name of a model, whatever the user typed: "hf:owner/name", "file:/absolute/path"."""
    location = os.path.abspath(ref.location) if ref.scheme == "file" else ref.location  # noqa: PTH100 - keeps links
    return f"{ref.scheme}:{location}"


def record(reference: str, kind: Kind, path: Path, detail: str = "") -> None:
    """Remembers that `path` was made from the model; a former record of the same path is forgotten.

    Raises nothing where the record cannot be written: what matters, the file itself, is there.
    """
    made = Product(reference=reference, kind=kind, path=str(path.absolute()), detail=detail)
    kept = [product for product in products() if product.path != made.path]
    content = json.dumps({"products": [asdict(product) for product in [*kept, made]]}, indent=1)
    with contextlib.suppress(TorchchatError, OSError):
        make_folder(cache_folder())
        write_whole(cache_folder() / RECORD, content + "\n")


def products() -> list[Product]:
    """What was recorded and is still there, oldest first. A damaged record, or row of it, counts as none."""
    try:
        rows = read_json(cache_folder() / RECORD).get("products")
    except TorchchatError:
        return []
    found = [_product(row) for row in rows] if isinstance(rows, list) else []
    return [product for product in found if product is not None and os.path.lexists(product.path)]


def _product(row: Any) -> Product | None:
    if not isinstance(row, dict) or row.get("kind") not in get_args(Kind):
        return None
    texts = [row.get(name) for name in ("reference", "path", "detail")]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        return None
    return Product(reference=row["reference"], kind=row["kind"], path=row["path"], detail=row["detail"])
