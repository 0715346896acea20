"""Files that several tests look at, exported once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core.cli.main import main

TESTDATA = Path(__file__).resolve().parents[4] / "shared" / "testdata"
MODELS = {"stories260K": "hf/stories260K", "TinyStories-656K": "hf/TinyStories-656K"}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], list[tuple[str, list[int], list[int]]]]:
    """Of one of `MODELS`: prompts, their ids, and the ids of prompt and greedy answer."""
    def read(name: str) -> list[tuple[str, list[int], list[int]]]:
        content = json.loads((TESTDATA / "golden" / name / "greedy_ids.json").read_text())
        return [(each["prompt"], each["prompt_ids"], each["ids"]) for each in content["prompts"]]

    return read


@pytest.fixture(scope="session", params=list(MODELS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a model, and its float32 .pte file in a folder of its own."""
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    path = tmp_path_factory.mktemp("exported") / f"{request.param}.pte"
    arguments = ["export", str(TESTDATA / MODELS[request.param]), "--output-pte-path", str(path), "-d", "fp32"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)
    return request.param, path
