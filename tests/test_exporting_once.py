"""The key of a model that was exported once: another one wherever something else went into the file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from torchchat_core.exporting_once import _key
from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.quantization.calibration import CalibrationText
from torchchat_core.specs import ModelFiles, ModelRef


@pytest.fixture
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    """Of a hub: each has a digest by its name."""
    for folder in ("model", "mine", "other"):
        (tmp_path / folder).mkdir()
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            (tmp_path / folder / name).write_text(folder)
    root = tmp_path / "model"
    names = ("model.safetensors", "tokenizer.json", "config.json")
    return ModelFiles(ref=ModelRef(text="m", scheme="hf", location="m"), format="safetensors", root=root,
                      weights=(root / names[0],), tokenizer=(root / names[1],), config=root / names[2],
                      digests=dict.fromkeys(names, "0" * 64))


def key(request: ModelRequest, files: ModelFiles, registry: Registry) -> str:
    if request.tokenizer_path is not None:
        files = dataclasses.replace(files, tokenizer=(Path(request.tokenizer_path),))
    if request.params_path is not None:
        files = dataclasses.replace(files, config=Path(request.params_path), config_chosen=True)
    return _key(request, files, "made:exporter", registry)


def test_files_of_the_model_go_by_their_digests(files: ModelFiles, registry: Registry) -> None:
    before = key(ModelRequest(), files, registry)
    os.utime(files.weights[0], (1, 1))
    assert key(ModelRequest(), files, registry) == before


@pytest.mark.parametrize(("field", "name"), [("tokenizer_path", "tokenizer.json"), ("params_path", "config.json"),
                                             ("adapter", "")])
def test_files_of_the_users_choice_do_not(field: str, name: str, files: ModelFiles, registry: Registry) -> None:
    requests = [ModelRequest(), *(ModelRequest(**{field: str(files.root.parent / folder / name)})  # type: ignore[arg-type]
                                  for folder in ("mine", "other"))]
    assert len({key(request, files, registry) for request in requests}) == 3


def test_a_file_of_the_users_choice_may_lie_in_the_models_folder(files: ModelFiles, registry: Registry) -> None:
    request = ModelRequest(tokenizer_path=str(files.tokenizer[0]))
    before = key(request, files, registry)
    os.utime(files.tokenizer[0], (1, 1))
    assert key(request, files, registry) != before


def test_the_calibration_text_and_its_length_are_in_the_key(files: ModelFiles, registry: Registry) -> None:
    texts = [CalibrationText(path=files.root.parent / folder / "config.json", tokens=tokens)
             for folder, tokens in (("mine", 1000), ("other", 1000), ("mine", 2000))]
    keys = {key(ModelRequest(calibration=text), files, registry) for text in (None, *texts)}
    assert len(keys) == 4
