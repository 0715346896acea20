"""Reading the real tokenizers of the test data, each once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core import builtins
from torchchat_core.plugins import CORE, Registry
from torchchat_core.specs import ModelFiles, ModelRef, Tokenizer
from torchchat_core.tokenizers.loading import read_tokenizer


def files_with(*tokenizer_files: Path) -> ModelFiles:
    """The files of a model of which only the tokenizer matters."""
    root = tokenizer_files[0].parent if tokenizer_files else Path("/nowhere")
    settings = root / "tokenizer_config.json"
    return ModelFiles(ref=ModelRef(text="a-model", scheme="file", location=str(root)), format="safetensors", root=root,
                      weights=(), tokenizer=tokenizer_files, tokenizer_config=settings if settings.is_file() else None)


@pytest.fixture(scope="session")
def model_files() -> Callable[..., ModelFiles]:
    return files_with


@pytest.fixture(scope="session")
def registry() -> Registry:
    made = Registry()
    made.add(builtins, "builtins", CORE)
    return made


@pytest.fixture(scope="session")
def read(registry: Registry) -> Callable[[Path], Tokenizer]:
    """The tokenizer of a file, found as a model's is."""
    return functools.cache(lambda path: read_tokenizer(files_with(path), registry))


@pytest.fixture(scope="session")
def real(testdata: Path, read: Callable[[Path], Tokenizer]) -> Callable[[str], Tokenizer]:
    """The tokenizer at a path in the test data."""
    return lambda path: read(testdata / path)
