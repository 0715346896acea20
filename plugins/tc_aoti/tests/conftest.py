"""Files that several tests use: compiling takes some ten seconds for each program."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from torchchat_core import kernels
from torchchat_core.pipeline import ModelRequest, export_model
from torchchat_core.plugins import load_registry
from torchchat_core.specs import ExporterInfo

TESTDATA = Path(__file__).resolve().parents[4] / "shared" / "testdata"
FORMS = (".pt2", ".so")


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real models and golden results, which is not part of the repository."""
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    return TESTDATA


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where there is none."""
    if not kernels.available():
        pytest.skip("there is no compiler")


def exported_to(folder: Path, model: Path, quantize: str | None = None, dtype: str = "fp32") -> Path:
    """A folder with the model in both forms, m.pt2 and m.so; what they were made of is gone."""
    copy = folder / "checkpoint"
    shutil.copytree(model, copy)
    registry = load_registry()
    for info in registry.infos(ExporterInfo):
        if info.suffix in FORMS:
            request = ModelRequest(model=str(copy), dtype=dtype, device="cpu", quantize=quantize)
            export_model(request, info, folder / f"m{info.suffix}", None, registry)
    shutil.rmtree(copy)
    return folder


@pytest.fixture(scope="session")
def stories(testdata: Path, tmp_path_factory: pytest.TempPathFactory, compiler: None) -> Path:
    """stories260K in float32."""
    return exported_to(tmp_path_factory.mktemp("stories"), testdata / "hf/stories260K")


@pytest.fixture(scope="session")
def tiny_stories(testdata: Path, tmp_path_factory: pytest.TempPathFactory, compiler: None) -> Path:
    """TinyStories-656K in float32."""
    return exported_to(tmp_path_factory.mktemp("tiny"), testdata / "hf/TinyStories-656K")


@pytest.fixture(scope="session")
def quantised(testdata: Path, tmp_path_factory: pytest.TempPathFactory, compiler: None) -> Path:
    """TinyStories-656K in bfloat16 with weights of four and embeddings of eight bits."""
    recipe = '{"linear:int4": {"groupsize": 32}, "embedding:int8": {"groupsize": 32}}'
    return exported_to(tmp_path_factory.mktemp("quantised"), testdata / "hf/TinyStories-656K", recipe, "bf16")
