"""The support matrix: what is refused is refused with one sentence everywhere, and something that works is named."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.plugins import Registry
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.specs import ExecutorInfo, ExporterInfo, QuantizerInfo
from torchchat_core.support import (
    Combination,
    all_combinations,
    choose_executor,
    nearest,
    refusal,
    require_export,
)

ANY: dict[str, Any] = {"summary": "s", "factory": "types:SimpleNamespace"}
CPU, BOTH = frozenset({"cpu"}), frozenset({"cpu", "cuda"})


@pytest.fixture
def registry() -> Registry:
    """Three executors, two quantizers, one exporter."""
    module = ModuleType("p")
    offered: dict[str, list[Any]] = {
        "torchchat_executors": [
            ExecutorInfo(name="general", reads=frozenset({"module"}), devices=BOTH, schemes=frozenset({"*"}),
                         dtypes=frozenset({"fp32", "bf16"}), order=20, **ANY),
            ExecutorInfo(name="quick", reads=frozenset({"module"}), devices=CPU, dtypes=frozenset({"bf16"}), order=10,
                         **ANY),
            ExecutorInfo(name="phone", reads=frozenset({"pte"}), devices=CPU, dtypes=frozenset({"fp32"}),
                         schemes=frozenset({"linear:int4"}), **ANY),
            ExecutorInfo(name="elsewhere", reads=frozenset({"module"}), devices=CPU, dtypes=frozenset({"fp32"}),
                         platforms=frozenset({"beos"}), order=1, **ANY),
        ],
        "torchchat_quantizers": [
            QuantizerInfo(name="int4", scheme="linear:int4", devices=CPU, dtypes=frozenset({"fp32"}), **ANY),
            QuantizerInfo(name="int8", scheme="linear:int8", devices=CPU, dtypes=frozenset({"bf16"}), **ANY),
        ],
        "torchchat_exporters": [
            ExporterInfo(name="pte", writes="pte", suffix=".pte", devices=CPU, dtypes=frozenset({"fp32"}),
                         schemes=frozenset({"linear:int4"}), **ANY),
        ],
    }
    for hook, infos in offered.items():
        setattr(module, hook, hookimpl(lambda infos=infos: infos))
    made = Registry()
    assert made.add(module, "p", "d").state == "loaded"
    return made


@pytest.mark.parametrize(("wanted", "sentence"), [
    ({"executor": "d:general", "device": "cuda", "dtype": "bf16"}, None),
    ({"executor": "d:general", "device": "mps", "dtype": "bf16"}, "does not run on mps; it runs on cpu, cuda"),
    ({"executor": "d:general", "device": "cpu", "dtype": "fp16"},
     "does not compute in fp16; it computes in bf16, fp32"),
    ({"executor": "d:quick", "device": "cpu", "dtype": "bf16", "scheme": "linear:int8"},
     "does not run linear:int8; it runs no quantised layers"),
    ({"executor": "d:general", "device": "cpu", "dtype": "bf16", "scheme": "linear:int8"}, None),
    ({"executor": "d:general", "device": "cuda", "dtype": "bf16", "scheme": "linear:int8"},
     "linear:int8 is not made for cuda; it is for cpu"),
    ({"executor": "d:general", "device": "cpu", "dtype": "fp32", "scheme": "linear:int8"},
     "linear:int8 does not compute in fp32; on cpu it does in bf16"),
    ({"executor": "d:general", "device": "cpu", "dtype": "fp32", "scheme": "linear:int2"},
     "no installed quantizer makes linear:int2"),
    ({"executor": "d:phone", "device": "cpu", "dtype": "fp32"}, "does not run models in memory; it runs pte files"),
    ({"executor": "d:phone", "device": "cpu", "dtype": "fp32", "scheme": "linear:int4", "format": "pte"}, None),
    ({"executor": "d:general", "device": "cpu", "dtype": "fp32", "format": "pte"}, "does not run pte files"),
    ({"executor": "d:elsewhere", "device": "cpu", "dtype": "fp32"}, "does not run on linux; it runs on beos"),
])
def test_a_refusal_is_one_sentence_that_says_what_works(wanted: dict[str, Any], sentence: str | None,
                                                        registry: Registry) -> None:
    found = refusal(Combination(**wanted), registry, platform="linux")
    assert (found is None) if sentence is None else (found is not None and sentence in found)


def test_the_nearest_combination_changes_as_little_as_possible(registry: Registry) -> None:
    wanted = Combination(executor="d:general", device="cuda", dtype="fp16")
    assert nearest(wanted, registry) in {Combination(executor="d:general", device="cuda", dtype=dtype)
                                         for dtype in ("fp32", "bf16")}
    assert nearest(wanted, Registry()) is None


def test_auto_takes_the_first_in_order_that_fits(registry: Registry) -> None:
    assert choose_executor("auto", "cpu", "bf16", (), registry).name == "quick"
    assert choose_executor("auto", "cpu", "fp32", (), registry).name == "general"
    assert choose_executor("auto", "cpu", "bf16", ("linear:int8",), registry).name == "general"
    assert choose_executor("d:quick", "cpu", "bf16", (), registry).name == "quick"


def test_a_command_refuses_with_the_sentence_of_the_matrix_and_names_what_works(registry: Registry) -> None:
    with pytest.raises(TorchchatError) as caught:
        choose_executor("quick", "cpu", "fp32", (), registry)
    assert caught.value.message == "executor 'quick' does not compute in fp32; it computes in bf16"
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("what works is d:")
    with pytest.raises(TorchchatError, match="no installed executor runs models in memory on mps in fp32"):
        choose_executor("auto", "mps", "fp32", (), registry)
    with pytest.raises(TorchchatError, match="there is no executor 'quik'"):
        choose_executor("quik", "cpu", "fp32", (), registry)


def test_every_combination_stands_in_the_matrix_once(registry: Registry) -> None:
    combinations = list(all_combinations(registry))
    assert len(combinations) == len(set(combinations)) == 4 * 2 * 3 * 3 * 3


def test_the_hint_is_the_same_for_a_bare_and_a_full_name(registry: Registry) -> None:
    hints = [nearest(Combination(executor=name, device="cpu", dtype="fp32"), registry) for name in ("quick", "d:quick")]
    assert hints[0] == hints[1] == Combination(executor="d:quick", device="cpu", dtype="bf16")


def test_auto_refuses_with_the_sentence_that_all_executors_share(registry: Registry) -> None:
    with pytest.raises(TorchchatError, match="no installed quantizer makes linear:int2"):
        choose_executor("d:general", "cpu", "bf16", ("linear:int2",), registry)
    with pytest.raises(TorchchatError) as caught:
        choose_executor("auto", "cpu", "fp16", (), registry)
    assert "fp16" in caught.value.message


@pytest.mark.parametrize(("text", "message"), [
    ("", "there is no recipe, file or scheme ''"), ("{}", "the recipe is empty"), ("{", "the recipe is not JSON"),
    ('{"linear:int8": {}, "linear:int8": {}}', "the recipe has 'linear:int8' twice"),
    ('{"linear:int9": {}}', "no installed quantizer makes 'linear:int9'.*did you mean"),
    ('{"linear:int8": null}', "the options of 'linear:int8' are None"),
    ('{"linear:int8": {"x": 1}}', "'linear:int8' has no options; 'x' was given"), ("[1]", "there is no recipe"),
])
def test_a_wrong_recipe_is_told(text: str, message: str, registry: Registry) -> None:
    with pytest.raises(TorchchatError, match=message):
        read_recipe(text, registry, "cpu", "bf16")


def test_of_several_makers_of_a_scheme_the_one_for_the_device_is_taken(registry: Registry) -> None:
    module = ModuleType("q")
    cuda = QuantizerInfo(name="aa", scheme="linear:int8", devices=frozenset({"cuda"}), dtypes=frozenset({"fp32"}),
                         **ANY)
    module.torchchat_quantizers = hookimpl(lambda: [cuda])  # type: ignore[attr-defined]
    registry.add(module, "q", "e")
    assert read_recipe("linear:int8", registry, "cuda", "fp32").steps[0].quantizer.name == "aa"
    assert read_recipe("linear:int8", registry, "cpu", "bf16").steps[0].quantizer.name == "int8"
    crossed = Combination(executor="d:general", device="cpu", dtype="fp32", scheme="linear:int8")
    assert refusal(crossed, registry) == "linear:int8 does not compute in fp32; on cpu it does in bf16"


def test_layers_that_a_file_holds_need_no_quantizer(registry: Registry) -> None:
    made = Combination(executor="d:general", device="cuda", dtype="bf16", scheme="linear:int2")
    assert refusal(made, registry) == "no installed quantizer makes linear:int2"
    assert refusal(replace(made, stored=True), registry) is None
    assert refusal(replace(made, scheme="linear:int8", stored=True), registry) is None  # made for the CPU alone
    assert choose_executor("auto", "cuda", "bf16", ("linear:int2",), registry, stored=True).name == "general"
    with pytest.raises(TorchchatError, match="does not run linear:int2") as caught:
        choose_executor("quick", "cpu", "bf16", ("linear:int2",), registry, stored=True)
    assert caught.value.fix == "what works is d:general on cpu in bf16 with linear:int2"


def test_what_an_exporter_does_not_take_is_told_with_those_that_do(registry: Registry) -> None:
    gguf = ExporterInfo(name="gguf", writes="gguf", suffix=".gguf", devices=CPU, dtypes=frozenset({"fp32"}), **ANY)
    for schemes, stored, fix in (
        (("linear:int4",), True, "use the exporter pte (.pte), or export the model that it was made of"),
        (("linear:int8",), True, "export the model that it was made of"),
        (("linear:int4",), False, "use the exporter pte (.pte), or leave --quantize out"),
        (("linear:int4", "linear:int8"), False, "leave --quantize out"),
    ):
        with pytest.raises(TorchchatError, match="it writes no quantised layers") as caught:
            require_export(gguf, "cpu", "fp32", schemes, registry, stored)
        assert caught.value.fix == fix
