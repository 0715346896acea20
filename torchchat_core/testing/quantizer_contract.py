"""The contract of a quantizer."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.pipeline import has_device
from torchchat_core.specs import DEVICES, DTYPES, Calibration, LayerReport, QuantizerInfo, QuantReport
from torchchat_core.testing.cases import FewThreads, device_parameter
from torchchat_core.testing.demands import demand, demand_none, described, options_of, refusal
from torchchat_core.testing.models import PROMPTS, VARIANTS, reference_logits, seeded, tiny_config

# Large enough for groups of 128 and tiles of 32 rows, where the model has no odd sizes.
SIZES: Mapping[str, Any] = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32,
                            "num_kv_heads": 4}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "llama": SIZES,
    "tied": {**SIZES, "tied_embeddings": True},
    "biases": {**SIZES, **VARIANTS["biases"]},
    "odd-sizes": VARIANTS["odd-sizes"],
}
LAYERS: Mapping[str, type[nn.Module]] = {"linear": nn.Linear, "embedding": nn.Embedding}
TOKENS = PROMPTS[1]
CALIBRATIONS = tuple(Calibration(windows=tuple(map(tuple, torch.randint(
    96, (8, 48), generator=torch.Generator().manual_seed(seed)).tolist()))) for seed in range(2))


@dataclass(frozen=True)
class Quantised:
    """A model before and after, and what the quantizer says about it."""

    before: Transformer
    after: Transformer
    report: QuantReport

    @functools.cached_property
    def done(self) -> list[LayerReport]:
        return [layer for layer in self.report.layers if layer.scheme is not None]

    @functools.cached_property
    def left(self) -> list[LayerReport]:
        return [layer for layer in self.report.layers if layer.scheme is None]


class QuantizerContract(FewThreads):
    """A quantizer's report is true, its error is bounded, and its options say all that there is to say.

        class TestQuantizer(QuantizerContract):
            plugin, name = "my_plugin", "mine"
            error_bound = 0.1
            recipes = ({}, {"groupsize": 32})

    A quantizer that looks at a text (`calibrates=True`) is given one of random tokens for each recipe that needs it;
    `recipes` has to hold such a one. The models are transformers with random weights: `CHANGES` has the sizes of those
    that should quantise well, and of one whose widths are multiples of nothing.
    """

    plugin: str  # the module that the entry point names
    name: str  # of the quantizer
    recipes: Sequence[Mapping[str, Any]] = ({},)  # values of its options that are tested
    error_bound: float = 0.1  # of the logits: |quantised - original| / |original|, for each of the recipes

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "recipe" in metafunc.fixturenames:
            metafunc.parametrize("recipe", self.recipes, ids=json.dumps)
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", list(CHANGES))
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", list(map(device_parameter, sorted(self.info.devices))))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", [dtype for dtype in DTYPES if dtype in self.info.dtypes])

    # ---- the report -----------------------------------------------------------------------------------------------

    def test_every_layer_of_the_kind_is_reported(self, recipe: Mapping[str, Any], variant: str) -> None:
        """Done, or left alone for a reason that is given: nothing is skipped in silence, and nothing listed twice."""
        result = self._apply(recipe, variant)
        names = [layer.name for layer in result.report.layers]
        kind = LAYERS[self.info.scheme.partition(":")[0]]
        wanted = [name for name, layer in result.before.named_modules() if isinstance(layer, kind)]
        demand(sorted(names) == sorted(wanted), f"reported are {_difference(names, wanted)} of the model's "
               f"{kind.__name__} layers", "add a LayerReport for each, by its name in `model.named_modules()`")
        demand_none([f"{layer.name} was left alone without a reason" for layer in result.left if not layer.reason],
                    "give a `reason` with the size and what it should be")
        demand_none([f"{layer.name} is reported as {layer.scheme}" for layer in result.done
                     if layer.scheme != self.info.scheme], f"report the declared scheme {self.info.scheme!r}")

    def test_the_bytes_of_the_report_are_those_of_the_layers(self, recipe: Mapping[str, Any], variant: str) -> None:
        """Who ships a model has to know what it weighs: parameters and buffers, before and after."""
        result = self._apply(recipe, variant)
        faults = []
        for layer in result.report.layers:
            true = [_bytes(model.get_submodule(layer.name)) for model in (result.before, result.after)]
            said = [layer.bytes_before, layer.bytes_after]
            if true != said:
                faults.append(f"{layer.name} is said to have {said[0]} bytes before and {said[1]} after, and has "
                              f"{true[0]} and {true[1]}")
        demand_none(faults, "count every parameter and buffer of the layer, scales and biases included, and keep what "
                            "belongs to it as a parameter or buffer")

    def test_what_fits_is_done(self, recipe: Mapping[str, Any]) -> None:
        """A quantizer that leaves everything alone is as good as none."""
        result = self._apply(recipe, "llama")
        reasons = {str(layer.reason) for layer in result.left}
        demand(result.done, f"no layer of a model with sizes {dict(SIZES)} was quantised: {'; '.join(reasons)}",
               "quantise layers whose sizes are multiples of 128")
        for layer in result.done:
            before, after = (model.get_submodule(layer.name) for model in (result.before, result.after))
            demand(_bytes(after) < _bytes(before), f"{layer.name} has {_bytes(before)} bytes before and "
                   f"{_bytes(after)} after", "keep the small weights in place of the large ones, not beside them")

    # ---- the model ------------------------------------------------------------------------------------------------

    def test_the_error_is_bounded(self, recipe: Mapping[str, Any], variant: str, dtype: str, device: str) -> None:
        """Quantising costs quality, and its author says how much at most."""
        result = self._apply(recipe, variant, dtype, device)
        given, expected = _logits(result.after), _logits(result.before)
        demand(given.isfinite().all(), f"the logits of the quantised {variant} model in {dtype} are not finite",
               "avoid division by a scale of zero, and sums that leave the range of float16")
        error = float((given - expected).norm() / expected.norm())
        demand(error <= self.error_bound, f"the logits of the quantised {variant} model in {dtype} are off by "
               f"{error:.3f}; {self.error_bound:.3f} is permitted",
               "look at scales, zero points and the order of packed values; set `error_bound` to what the scheme "
               "costs on random weights")

    def test_biases_stay(self, recipe: Mapping[str, Any], dtype: str) -> None:
        """What a layer gives for zeros is its bias: it must neither be lost nor quantised."""
        result = self._apply(recipe, "biases", dtype)
        for layer in result.done:
            before, after = (model.get_submodule(layer.name) for model in (result.before, result.after))
            if not isinstance(before, nn.Linear) or before.bias is None:
                continue
            given = after(torch.zeros_like(before.weight[:1]))[0]
            demand(torch.equal(given, before.bias), f"{layer.name} gives {_head(given)} for zeros, and its bias was "
                   f"{_head(before.bias)}", "carry the bias over, and add it to the product; let zeros stay zeros "
                   "where activations are quantised")

    def test_what_is_left_alone_stays_as_it_was(self, recipe: Mapping[str, Any], variant: str) -> None:
        """Every tensor outside the layers that are reported as done: norms, other layers, a tied embedding."""
        result = self._apply(recipe, variant)
        done = {layer.name for layer in result.done}
        after = dict(result.after.state_dict())
        for name, tensor in result.before.state_dict().items():
            if name.rpartition(".")[0] in done:
                continue
            same = name in after and after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
            demand(same, f"{name} was changed, although its layer is not reported as done",
                   "replace only the layers that are reported, and write to no tensor that another layer shares")

    def test_odd_sizes_are_left_alone_or_done(self, recipe: Mapping[str, Any]) -> None:
        """A layer whose width is no multiple of the group size is a line in the report, not a crash."""
        try:
            result = self._apply(recipe, "odd-sizes")
        except Exception as error:
            demand(False, f"a model with sizes {dict(CHANGES['odd-sizes'])} raises {type(error).__name__}: {error}",
                   "check the sizes of each layer first; leave it alone with a reason, or pad it")
        else:
            demand(_logits(result.after).isfinite().all(), "the logits of a model with odd sizes are not finite",
                   "leave the layers alone that do not fit")

    def test_the_options_reproduce_the_model(self, recipe: Mapping[str, Any], dtype: str) -> None:
        """A recipe that is kept beside a model makes the same model again, bit by bit."""
        first = self._apply(recipe, "llama", dtype)
        options = options_of(self.info, recipe)
        read = None if options is None else json.loads(json.dumps(asdict(options)))
        second = self._apply(recipe if read is None else read, "llama", dtype)
        demand(first.report == second.report, "applied again with the same options, the report is another",
               "let the options alone decide")
        states = [model.state_dict() for model in (first.after, second.after)]
        changed = [name for name, tensor in states[0].items() if not _equal(tensor, states[1].get(name))]
        demand(not changed, f"applied again with the same options, {', '.join(changed[:3])} differ",
               "let the options alone decide: seed whatever is drawn at random with one of them")
        demand(torch.equal(_logits(first.after), _logits(second.after)), "applied again with the same options, the "
               "logits differ", "let a layer's result depend on nothing but its input and its weights")

    # ---- the text -------------------------------------------------------------------------------------------------

    def test_a_text_is_asked_for_where_it_is_needed(self) -> None:
        """Layers that were to be made with a text are never made without one in silence."""
        model = seeded(tiny_config(**SIZES))
        for recipe in self._calibrated():
            options = options_of(self.info, recipe)
            with refusal(f"apply() with {dict(recipe)}, which needs a calibration text,"):
                self.info.make().apply(model, options)

    def test_the_text_has_a_say(self) -> None:
        """A quantizer that asks for a text and does not look at it costs its user an hour for nothing."""
        for recipe in self._calibrated():
            states = [self._apply(recipe, "llama", calibration=text).after.state_dict() for text in CALIBRATIONS]
            demand(not all(_equal(tensor, states[1].get(name)) for name, tensor in states[0].items()),
                   f"with {dict(recipe)}, two calibration texts make the same layers",
                   "look at the activations in calibrate(), or let needs_calibration() return False")

    # ---- what the tests are made of -------------------------------------------------------------------------------

    @property
    def info(self) -> QuantizerInfo:
        return described(self.plugin, QuantizerInfo, self.name)

    def _calibrated(self) -> list[Mapping[str, Any]]:
        """The recipes that need a text."""
        if not self.info.calibrates:
            pytest.skip("the quantizer looks at no text")
        made = self.info.make()
        found = [recipe for recipe in self.recipes if made.needs_calibration(options_of(self.info, recipe))]
        demand(found, "none of the tested recipes needs a calibration text, and the quantizer declares calibrates=True",
               "add one to `recipes`, or do not declare it")
        return found

    def _apply(self, recipe: Mapping[str, Any], variant: str, dtype: str | None = None, device: str | None = None,
               calibration: Calibration = CALIBRATIONS[0]) -> Quantised:
        """One of the models, quantised by the recipe; on the first of the devices and in the first of the dtypes."""
        devices = [name for name in DEVICES if name in self.info.devices and has_device(name)]
        if not devices:
            pytest.skip(f"this machine has none of the devices {', '.join(sorted(self.info.devices))}")
        dtype = dtype or next(name for name in DTYPES if name in self.info.dtypes)
        before = seeded(tiny_config(**CHANGES[variant])).to(device or devices[0], TORCH_DTYPES[dtype])
        after = copy.deepcopy(before)
        with torch.no_grad():
            made, options = self.info.make(), options_of(self.info, recipe)
            needed = self.info.calibrates and made.needs_calibration(options)
            report: QuantReport = made.calibrate(after, options, calibration) if needed else made.apply(after, options)
        demand(isinstance(report, QuantReport), f"apply() returns {report!r:.60}", "return a QuantReport")
        return Quantised(before, after, report)


def _logits(model: Transformer) -> Tensor:
    """Logits [n, vocab] of `TOKENS`, float32 on the CPU."""
    return reference_logits(model, TOKENS).float().cpu()


def _bytes(layer: nn.Module) -> int:
    """What parameters and buffers take, as they are stored."""
    return sum(_stored_bytes(tensor) for tensor in (*layer.parameters(), *layer.buffers()))


def _stored_bytes(tensor: Tensor) -> int:
    """Also of wrappers such as torchao's, whose tensors lie in attributes."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(_stored_bytes(getattr(tensor, name)) for name in flatten()[0])


def _equal(tensor: Any, other: Any) -> bool:
    """Whether two entries of a state are the same; those that are no tensors are compared as what they are."""
    if isinstance(tensor, Tensor) and isinstance(other, Tensor):
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:
            return type(tensor) is type(other) and all(_equal(getattr(tensor, name), getattr(other, name))
                                                       for name in flatten()[0])
        return tensor.dtype == other.dtype and torch.equal(tensor, other)
    return bool(tensor == other)


def _difference(names: Sequence[str], wanted: Sequence[str]) -> str:
    missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    twice = sorted({name for name in names if names.count(name) > 1})
    listed = {"not": missing, "unknown": extra, "twice": twice}
    return ", ".join(f"{word} {' '.join(found[:3])}" for word, found in listed.items() if found)


def _head(tensor: Tensor) -> str:
    return str([round(float(value), 4) for value in tensor.flatten()[:3]])
