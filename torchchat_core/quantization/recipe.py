"""A recipe says how a model is made smaller, in one JSON object:

    {"version": 1,
     "executor": {"accelerator": "cpu"}, "precision": {"dtype": "bf16"},
     "linear:int4": {"groupsize": 32, "except": ["*.o_proj"]},
     "linear:int8": {"layers": ["lm_head"]},
     "embedding": {"bitwidth": 8, "groupsize": 0}}

Keys with a colon are sections: a scheme, the options of its quantizer, and which layers it takes (`selection`). A
section may say its scheme's "bitwidth" again, as recipes of the original tool do.
`--quantize` takes such an object, a file that holds one, the name of a recipe that comes with torchchat, or a scheme.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, did_you_mean, quoted, quoted_path
from torchchat_core.models.transformer import Transformer
from torchchat_core.options import from_mapping
from torchchat_core.plugins import Registry
from torchchat_core.quantization.replacing import stored_bytes
from torchchat_core.quantization.selection import (
    EXCEPT,
    LAYERS,
    Selection,
    check_selections,
    layers_of_sections,
    only,
)
from torchchat_core.run_options import DTYPE_SYNONYMS
from torchchat_core.small_files import expanded, is_file, read_json
from torchchat_core.specs import Calibration, LayerReport, QuantizerInfo, QuantReport

VERSION = 1
MAXIMUM_BYTES = 1 << 20  # of a file; thousands of times what one needs
SHIPPED = Path(__file__).resolve().parent.parent / "data" / "recipes"
SETTINGS = {"executor": "accelerator", "precision": "dtype"}  # sections that say how the model runs, and their one key
EMBEDDING = "embedding"  # the section by the original's name: its bitwidth chooses the scheme
KEYS = ("version", *SETTINGS, EMBEDDING)
BITWIDTH = "bitwidth"
BITS_OF_SCHEME = re.compile(r".*(?:int|w)(\d+)(?:dq)?")  # "linear:int4", "linear:a8w4dq": the bits of the weights
METHODS = {"linear:gptq": "gptq", "linear:hqq": "hqq"}  # schemes of the original tool that are methods here


@dataclass(frozen=True)
class Step:
    """One section of a recipe: what makes the layers, its options, checked, and which layers it takes."""

    scheme: str
    quantizer: QuantizerInfo
    options: Any
    selection: Selection

    @property
    def calibrated(self) -> bool:
        """Whether its layers are made with a text."""
        return self.quantizer.calibrates and bool(self.quantizer.make().needs_calibration(self.options))

    def apply(self, model: Transformer, calibration: Calibration | None) -> QuantReport:
        """Replaces the layers of `model` in place, all that are not hidden."""
        quantizer = self.quantizer.make()
        report: QuantReport = quantizer.calibrate(model, self.options, calibration) if self.calibrated \
            else quantizer.apply(model, self.options)
        return report

    def __str__(self) -> str:
        """The scheme, and what is said beyond its defaults: "linear:int4 groupsize=64"."""
        known = () if self.options is None else fields(self.options)
        said = {each.name: value for each in known if (value := getattr(self.options, each.name)) != each.default}
        if self.selection.layers is not None:
            said[LAYERS] = sorted(self.selection.layers)
        if self.selection.excepted:
            said[EXCEPT] = sorted(self.selection.excepted)
        return " ".join([self.scheme, *(f"{name}={json.dumps(said[name], default=str)}" for name in sorted(said))])


@dataclass(frozen=True, kw_only=True)
class RecipeReport:
    """What a recipe did: every layer of the kinds that it has sections for, and the bytes of the whole model."""

    layers: tuple[LayerReport, ...]
    bytes_before: int  # of all weights; those that layers share count once
    bytes_after: int
    bytes_in_files: int | None = None  # of all weights in the dtype of the checkpoint; None if unknown

    @property
    def done(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is None)


@dataclass(frozen=True)
class Recipe:
    """The sections in the order in which they are applied."""

    steps: tuple[Step, ...]

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(step.scheme for step in self.steps)

    def __str__(self) -> str:
        """The same for two recipes that say the same, however they were written."""
        return ", ".join(sorted(map(str, self.steps)))

    def apply(self, model: Transformer, calibration: Calibration | None = None) -> RecipeReport:
        """Replaces the layers of `model` in place; with a text last, so that they make up for the others' errors.

        Raises `TorchchatError` where the sections do not select layers of this model, and where one needs a text that
        is not given or none needs the one that is, before anything is changed.
        """
        check_calibration(self.steps, calibration is not None)
        chosen, left = layers_of_sections(model, [step.selection for step in self.steps])
        before, reports = stored_bytes(model), list[LayerReport]()
        for step, names in sorted(zip(self.steps, chosen, strict=True), key=lambda pair: pair[0].calibrated):
            with only(model, names):
                reports += step.apply(model, calibration).layers
        for name in left:
            size = stored_bytes(model.get_submodule(name))
            reports.append(LayerReport(name=name, scheme=None, bytes_before=size, bytes_after=size,
                                       reason="the recipe leaves it out"))
        return RecipeReport(layers=tuple(reports), bytes_before=before, bytes_after=stored_bytes(model))


@dataclass(frozen=True)
class RecipeText:
    """A recipe as it was written, before it is known what the model runs on."""

    content: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]  # scheme -> options and selection
    device: str | None = None  # where it says so, as --device takes it
    dtype: str | None = None  # likewise, as --dtype takes it

    def steps(self, registry: Registry, device: str, dtype: str) -> tuple[Step, ...]:
        """Each section with its quantizer. Raises `TorchchatError` for options that one refuses."""
        return tuple(_step(scheme, section, registry, device, dtype) for scheme, section in self.sections.items())

    def settle(self, registry: Registry, device: str, dtype: str, calibrated: bool = False) -> Recipe:
        """With the quantizers for the device and the dtype; `calibrated`: whether there will be a text.

        Raises `TorchchatError` for options that the quantizers refuse, and where a text is missing or of no use.
        """
        steps = self.steps(registry, device, dtype)
        check_selections([step.selection for step in steps])
        check_calibration(steps, calibrated)
        return Recipe(steps)


def check_calibration(steps: Sequence[Step], given: bool) -> None:
    """Raises `TorchchatError` where a step needs a text and none is given, or one is given that no step needs."""
    needing = [step.scheme for step in steps if step.calibrated]
    if needing and not given:
        raise TorchchatError(f"{quoted(needing[0])} with these options is made with a calibration text, and there is "
                             "none",
                             "torchchat quantize MODEL --quantize RECIPE --calibration FILE --output-dir DIR, and then "
                             "use the folder as the model")
    if given and not needing:
        raise TorchchatError("no section of the recipe looks at a calibration text",
                             'leave the text out, or write a section such as {"linear:int4": {"method": "gptq"}}')


def read_recipe(text: str, registry: Registry, device: str, dtype: str, calibrated: bool = False) -> Recipe:
    """The recipe that a user means: a JSON object, a file, or the name of a recipe or a scheme.

    Where several quantizers make a scheme, the one for the device and the dtype is taken. Raises `TorchchatError`
    for what is no recipe, a scheme that no installed quantizer makes, or wrong options.
    """
    return parse_recipe(text, registry).settle(registry, device, dtype, calibrated)


def parse_recipe(text: str, registry: Registry) -> RecipeText:
    """The recipe that a user means, without its options being checked yet."""
    content = _content(text, registry)
    version = content.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise TorchchatError(f"the recipe is of version {quoted(version)}; this torchchat reads version {VERSION}",
                             "use a newer torchchat")
    sections: dict[str, Mapping[str, Any]] = {}
    for key, value in content.items():
        scheme, section = _section(key, value, registry)
        if scheme in sections:
            raise TorchchatError(f"the recipe has two sections for {quoted(scheme)}")
        if scheme is not None:
            sections[scheme] = section
    device, dtype = (_setting(content, key) for key in SETTINGS)
    if not sections and device is None and dtype is None:
        raise TorchchatError("the recipe is empty", 'give a scheme, such as {"linear:int8": {}}')
    return RecipeText(content, sections, device, dtype)


def is_json(text: str | None) -> bool:
    """Whether a recipe was given as a JSON object, which is no name for it."""
    return text is not None and text.lstrip().startswith("{")


def _content(text: str, registry: Registry) -> Mapping[str, Any]:
    if is_json(text):
        return _object(text, "the recipe")
    known = _schemes(registry)
    if text in known:
        return {text: {}}
    if text in recipe_names():
        return read_json(SHIPPED / f"{text}.json")
    path = expanded(text)
    if is_file(path):
        return _object(_text_of(path), f"the recipe {path}")
    if path.stem in recipe_names() and path.parts[-3:-1] == ("config", "data"):  # where the original tool had them
        return read_json(SHIPPED / f"{path.stem}.json")
    if path.stem in recipe_names():
        raise TorchchatError(f"there is no file {quoted_path(text)}; the recipe comes with torchchat",
                             f"--quantize {path.stem}")
    names = (*recipe_names(), *known)
    raise TorchchatError(f"there is no recipe, file or scheme {quoted_path(text)}; recipes: "
                         f"{', '.join(recipe_names())}; schemes here: {', '.join(known) or 'none'}",
                         registry.how_to_get("schemes", text) or _other_name(text) or did_you_mean(text, names)
                         or "give a recipe, a scheme, a JSON file, or a JSON object")


def _other_name(text: str) -> str | None:
    """Return the scheme for what other tools call a quantization, such as "q4_0"; None for any other text."""
    meant = DTYPE_SYNONYMS.get(text.lower(), "")
    return f"--quantize {meant}" if ":" in meant else None


def stored_recipe(content: Mapping[str, Any] | None, schemes: Sequence[str], registry: Registry, device: str,
                  dtype: str) -> str | None:
    """What made the quantised layers that a folder or an exported file holds, as the text of a `Recipe`; None without
    such layers. Where nobody wrote it down, or what made them is not installed, that is said in its place."""
    if not schemes:
        return None
    if content is not None:
        try:
            steps = parse_recipe(json.dumps(content), registry).steps(registry, device, dtype)
            return str(Recipe(steps))
        except TorchchatError:
            return json.dumps(content, sort_keys=True)
    return f"{', '.join(sorted(schemes))} as stored"


@cache
def recipe_names() -> tuple[str, ...]:
    """The recipes that come with torchchat."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.json")))


def _text_of(path: Path) -> str:
    """The content of a file that somebody wrote or was given. Raises `TorchchatError` for what is no recipe."""
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES + 1)
        if len(content) > MAXIMUM_BYTES:
            raise TorchchatError(f"the recipe {path} has more than {MAXIMUM_BYTES} bytes, which no recipe has")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise TorchchatError(f"the recipe {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TorchchatError(f"the recipe {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
                             ) from None


def _object(text: str, owner: str) -> Mapping[str, Any]:
    """The JSON object that a recipe is. Raises `TorchchatError`, which calls it `owner`, for anything else."""
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise TorchchatError(f"{owner} is not JSON: {error}", "correct it there") from None
    if not isinstance(content, dict):
        raise TorchchatError(f"{owner} holds a JSON {type(content).__name__}; it has to be an object",
                             'such as {"linear:int4": {"groupsize": 32}}')
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TorchchatError(f"the recipe has {quoted(max(names, key=names.count))} twice")
    return found


# ---- its keys -----------------------------------------------------------------------------------------------------


def _setting(content: Mapping[str, Any], key: str) -> str | None:
    """What "executor" or "precision" says."""
    if key not in content:
        return None
    section, name = content[key], SETTINGS[key]
    if not isinstance(section, Mapping) or section.keys() != {name} or not isinstance(section[name], str):
        raise TorchchatError(f"{quoted(key)} is {quoted(section)} in the recipe; it has to be an object with "
                             f"{quoted(name)} alone",
                             f'such as {{"{key}": {{"{name}": "{"cpu" if key == "executor" else "bf16"}"}}}}')
    return str(section[name])


def _section(key: str, value: Any, registry: Registry) -> tuple[str | None, Mapping[str, Any]]:
    """The scheme that a key stands for, and what is said of it; None for the keys that are no sections."""
    if key == "version" or key in SETTINGS:
        return None, {}
    if key != EMBEDDING and ":" not in key:
        known = (*KEYS, *_schemes(registry))
        raise TorchchatError(f"the recipe has the unknown key {quoted(key)}; known are {', '.join(known)}",
                             did_you_mean(key, known))
    if not isinstance(value, Mapping):
        raise TorchchatError(f"the options of {quoted(key)} are {quoted(value)}; they have to be a JSON object")
    if key != EMBEDDING:
        return key, value
    bits = value.get("bitwidth", 8)
    if bits not in (4, 8) or not isinstance(bits, int) or isinstance(bits, bool):
        raise TorchchatError(f"the bitwidth of the embedding is {quoted(bits)}; it has to be 4 or 8")
    return f"embedding:int{bits}", {name: each for name, each in value.items() if name != "bitwidth"}


def _step(scheme: str, section: Mapping[str, Any], registry: Registry, device: str, dtype: str) -> Step:
    makers = [info for info in registry.infos(QuantizerInfo) if info.scheme == scheme]
    known = _schemes(registry)
    if not makers and scheme in METHODS:
        raise TorchchatError(f"{quoted(scheme)} is no scheme, but a way to round the weights of one",
                             f'write {{"linear:int4": {{"method": "{METHODS[scheme]}"}}}}')
    if not makers:
        raise TorchchatError(f"no installed quantizer makes {quoted(scheme)}; schemes here: "
                             f"{', '.join(known) or 'none'}",
                             registry.how_to_get("schemes", scheme) or did_you_mean(scheme, known)
                             or "install the plugin that makes it")
    fitting = [info for info in makers if device in info.devices and dtype in info.dtypes] or makers
    quantizer = registry.find(QuantizerInfo, fitting[0].name)  # several owners of one name are an error there
    selection, options = Selection.split(scheme, section)
    options = _without_bitwidth(scheme, quantizer, options)
    if quantizer.options is None:
        if options:
            raise TorchchatError(f"{quoted(scheme)} has no options; {quoted(next(iter(options)))} was given")
        return Step(scheme, quantizer, None, selection)
    try:
        return Step(scheme, quantizer, from_mapping(quantizer.options, options), selection)
    except TorchchatError as error:
        raise TorchchatError(f"{scheme}: {error.message}", error.fix) from None


def _without_bitwidth(scheme: str, quantizer: QuantizerInfo, options: dict[str, Any]) -> dict[str, Any]:
    """The options without what the scheme's name says already. Raises `TorchchatError` where they say otherwise."""
    declared = quantizer.options is not None and BITWIDTH in {field.name for field in fields(quantizer.options)}
    bits = BITS_OF_SCHEME.fullmatch(scheme)
    if BITWIDTH not in options or declared or bits is None:
        return options
    given = options[BITWIDTH]
    if given != int(bits[1]) or isinstance(given, bool):
        raise TorchchatError(f"the bitwidth of {quoted(scheme)} is {quoted(given)} in the recipe; that scheme has "
                             f"{bits[1]}",
                             f'leave "{BITWIDTH}" out, or choose another scheme')
    return {name: value for name, value in options.items() if name != BITWIDTH}


def _schemes(registry: Registry) -> list[str]:
    return sorted({info.scheme for info in registry.infos(QuantizerInfo)})
