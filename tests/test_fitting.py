"""What frontends offer to choose from is what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.fitting import fitting
from torchchat_core.hookspecs import hookimpl
from torchchat_core.pipeline import ModelRequest, has_device, open_model
from torchchat_core.plugins import load_registry
from torchchat_core.specs import DEVICES, DTYPES, ExecutorInfo


def test_what_fits_opens_and_what_does_not_is_not_offered() -> None:
    registry, request = load_registry(), ModelRequest(executor="eager")
    found = fitting(request, registry)
    assert "eager" in found.executors
    assert "executorch" not in found.executors  # it reads files
    assert None in found.recipes
    assert has_device("cuda") or "cuda" not in found.recipes
    assert found.devices == tuple(device for device in DEVICES if has_device(device))
    assert found.dtypes == DTYPES
    for recipe in (None, "cpu", found.recipes[-1]):
        with open_model(dataclasses.replace(request, quantize=recipe), registry) as opened:
            assert bool(opened.schemes) == (recipe is not None)


class Narrow:
    """A plugin whose executor computes in one dtype, on one device."""

    @hookimpl
    def torchchat_executors(self) -> list[ExecutorInfo]:
        return [ExecutorInfo(name="narrow", summary="s", factory="tc_eager.executor:Eager", dtypes=frozenset({"fp32"}),
                             reads=frozenset({"module"}), devices=frozenset({"cpu"}))]


def test_each_choice_leaves_those_that_go_with_it() -> None:
    registry = load_registry()
    registry.add(Narrow(), "narrow", "tc-narrow")
    narrow = fitting(ModelRequest(executor="narrow"), registry)  # in bf16, as the model is
    assert narrow.dtypes == ("fp32",)
    assert (narrow.devices, narrow.recipes) == ((), ())
    assert "narrow" not in narrow.executors
    assert "narrow" in fitting(ModelRequest(dtype="fp32"), registry).executors
    assert fitting(ModelRequest(executor="narrow", dtype="fp32"), registry).devices == ("cpu",)


def test_a_quantised_model_is_not_quantised_again(testdata: Path) -> None:
    model = testdata / "gguf" / "TinyStories-656K-Q4_0.gguf"
    request = ModelRequest(model=str(model), keep_quantized=True)
    assert fitting(request, load_registry()).recipes == (None,)


def test_a_model_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TorchchatError, match="no model"):
        fitting(ModelRequest(model="nothing-of-this-name"), load_registry())
