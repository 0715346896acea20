"""Two quantizers made of core's layers, as plugins make them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
from torch import nn

from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.plugins import Registry
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.specs import LayerReport, QuantizerInfo, QuantReport


@dataclass(frozen=True, kw_only=True)
class Options:
    groupsize: int = option(32, "columns that share one scale", minimum=0)


class Made:
    """A quantizer whose scheme says how many bits; `factory` has to be an attribute of a module."""

    scheme = "linear:int4"

    def apply(self, model: nn.Module, options: Options) -> QuantReport:
        form = WeightFormat(bits=int(self.scheme[-1]), group_size=options.groupsize or None)
        return quantise_layers(model, self.scheme, form)


class Int8(Made):
    scheme = "linear:int8"


class Embedding4(Made):
    scheme = "embedding:int4"


class Embedding8(Made):
    scheme = "embedding:int8"


class OfItsOwn:
    """Makes layers that are none of core's."""

    def apply(self, model: nn.Module, _options: None) -> QuantReport:
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for name in names:
            model.set_submodule(name, nn.Sequential(model.get_submodule(name)))
        return QuantReport(layers=tuple(LayerReport(name=name, scheme="linear:own", bytes_before=1, bytes_after=1)
                                        for name in names))


@pytest.fixture
def registry(isolated_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Core's own offers, an executor, and quantizers for linear:int4 and int8, embedding:int4 and int8, linear:own."""
    import sys

    import tc_eager

    makers = {"int4": Made, "int8": Int8, "embedding4": Embedding4, "embedding8": Embedding8, "own": OfItsOwn}
    module = ModuleType("made_quantizers")
    for name, maker in makers.items():
        setattr(module, name, maker)
    monkeypatch.setitem(sys.modules, "made_quantizers", module)
    infos = [QuantizerInfo(name=name, summary="s", scheme=getattr(maker, "scheme", "linear:own"),
                           factory=f"made_quantizers:{name}", options=None if name == "own" else Options,
                           devices=frozenset({"cpu", "cuda"}), dtypes=frozenset({"fp32", "bf16"}))
             for name, maker in makers.items()]
    module.torchchat_quantizers = hookimpl(lambda: infos)  # type: ignore[attr-defined]
    assert isolated_registry.add(module, "made", "made").state == "loaded"
    assert isolated_registry.add(tc_eager, "eager", "tc-eager").state == "loaded"
    return isolated_registry
