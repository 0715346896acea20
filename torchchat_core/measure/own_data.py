"""Replace the data set of an lm-eval task with documents from a file, so that it needs no network."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import read_text

FIX = "give plain text, or JSON lines with the fields that the task reads"


def documents_of(path: Path) -> list[dict[str, Any]]:
    """Return the documents in a file: the objects of a .jsonl or .json file, or the pages of plain text.

    A page begins at a top-level heading, "= Title =", as in WikiText and in lm-eval's copy of it
    (EleutherAI/wikitext_document_level); a text without such headings is one page. Raises `TorchchatError` for a file
    that cannot be read or has no documents.
    """
    text = read_text(path, FIX)
    try:
        if path.suffix.lower() == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix.lower() == ".json":
            found = json.loads(text)
        else:
            found = [{"page": page, "text": page} for page in _pages(text)]  # most other tasks read the field "text"
    except json.JSONDecodeError as error:
        raise TorchchatError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}", FIX
                             ) from None
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise TorchchatError(f"{path} has no documents", FIX)
    return found


def _pages(text: str) -> Iterator[str]:
    page: list[str] = []
    for line in text.split("\n"):
        stripped = line.replace("= = =", "===").replace("= =", "==").strip()
        if stripped.startswith("= ") and stripped.endswith(" =") and any(each.strip() for each in page):
            yield "\n".join(page)
            page = []
        page.append(line)
    if any(each.strip() for each in page):
        yield "\n".join(page)


@contextmanager
def in_place_of_the_data_set(documents: list[dict[str, Any]]) -> Iterator[None]:
    """Replace every data set that lm-eval loads in the block with the documents, in every split."""
    made = datasets.Dataset.from_list(documents)
    before = datasets.load_dataset
    datasets.load_dataset = lambda *_, **__: defaultdict(lambda: made)
    try:
        yield
    finally:
        datasets.load_dataset = before
