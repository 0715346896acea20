"""Fields of a stranger's JSON, each checked for its type and range before it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torchchat_core.archive import DAMAGED
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig, RopeScaling

LONGEST_TEXT = 1 << 20
DIGEST = re.compile(r"[0-9a-f]{64}")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file and no terminal takes
SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")


class Fields:
    """A JSON object. Every method raises `TorchchatError` where the field is missing, or not of that kind."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def text(self, name: str) -> str:
        return self.checked_text(name, self.content.get(name))

    def optional_text(self, name: str) -> str | None:
        return None if self.content.get(name) is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self.checked_text(name, value) for value in self._list(name))

    def one_of(self, name: str, known: Iterable[str]) -> str:
        value = self.text(name)
        if value not in known:
            raise self._wrong(name, value, f"one of {', '.join(known)}")
        return value

    def number(self, name: str, minimum: int, maximum: int) -> int:
        """A whole number."""
        return self._number(name, self.content.get(name), minimum, maximum)

    def optional_number(self, name: str, minimum: int, maximum: int) -> int | None:
        return None if self.content.get(name) is None else self.number(name, minimum, maximum)

    def numbers(self, name: str, minimum: int, maximum: int) -> tuple[int, ...]:
        return tuple(self._number(name, value, minimum, maximum) for value in self._list(name))

    def scalars(self, name: str, maximum: float) -> tuple[float, ...]:
        """Numbers of at most `maximum` in either direction."""
        values = self._list(name)
        for value in values:
            if not isinstance(value, int | float) or isinstance(value, bool) or not -maximum <= value <= maximum:
                raise self._wrong(name, value, f"a number from {-maximum:g} to {maximum:g}")
        return tuple(float(value) for value in values)

    def boolean(self, name: str) -> bool:
        value = self.content.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.content.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value

    def optional_mapping(self, name: str) -> Mapping[str, Any] | None:
        return None if self.content.get(name) is None else self.mapping(name)

    def inner(self, name: str) -> Fields:
        """The fields of the object that a field is."""
        return Fields(self.mapping(name), f"{quoted(name)} of {self.where}")

    def checked_text(self, name: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > LONGEST_TEXT or SURROGATE.search(value):
            raise self._wrong(name, value, "a text")
        return value

    def digest(self, name: str, value: object) -> str:
        if not isinstance(value, str) or not DIGEST.fullmatch(value):
            raise self._wrong(f"digest of {name:.60}", value, "64 hexadecimal digits")
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.content.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def _number(self, name: str, value: object, minimum: int, maximum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self._wrong(name, value, f"a whole number from {minimum} to {maximum}")
        return value

    def _wrong(self, name: str, value: object, wanted: str) -> TorchchatError:
        return TorchchatError(f"{quoted(name)} in {self.where} is {quoted(value)}; it has to be {wanted}", DAMAGED)


def config_from_json(content: Mapping[str, Any], where: str) -> ModelConfig:
    """A `ModelConfig` from what `dataclasses.asdict` made of one, through JSON.

    Raises `TorchchatError` for a field that is unknown, missing, or not of its type or range.
    """
    values = _typed(ModelConfig, content, f"the config in {where}")
    if values.get("rope_scaling") is not None:
        scaling = _typed(RopeScaling, values["rope_scaling"], f"rope_scaling in {where}")
        if scaling.get("kind") not in SCALINGS:
            raise TorchchatError(f"rope_scaling in {where} is of the kind {quoted(scaling.get('kind'))}", DAMAGED)
        values["rope_scaling"] = RopeScaling(**scaling)
    config = ModelConfig(**values)
    if config.sliding_layers is not None and len(config.sliding_layers) != config.num_layers:
        raise TorchchatError(f"the config in {where} has {len(config.sliding_layers)} sliding_layers for "
                             f"{config.num_layers} layers", DAMAGED)
    return config


def _typed(kind: type[ModelConfig] | type[RopeScaling], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a dataclass, each of the type that it declares; lists as tuples."""
    hints, declared = get_type_hints(kind), {each.name: each for each in fields(kind)}
    unknown = sorted(set(content) - set(declared))
    missing = sorted(name for name, each in declared.items() if name not in content and each.default is _NONE)
    if unknown or missing:
        raise TorchchatError(f"{where} has {'the unknown field' if unknown else 'no field'} "
                             f"{quoted((unknown or missing)[0])}", "use a newer torchchat, or export the model again")
    return {name: _converted(value, hints[name], f"{quoted(name)} in {where}") for name, value in content.items()}


_NONE = fields(ModelConfig)[0].default  # dataclasses' mark of a field without a default


def _converted(value: Any, hint: Any, what: str) -> Any:
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    for option in options:
        if get_origin(option) is tuple and isinstance(value, list):
            inner = get_args(option)[0]
            return tuple(_converted(each, inner, what) for each in value)
        if option is RopeScaling and isinstance(value, dict):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:  # a whole number of hundreds of digits
                break
            if not math.isfinite(number):
                break
            return number
        if type(value) is option:
            return value
    raise TorchchatError(f"{what} is {quoted(value)}, which is not of its type", DAMAGED)
