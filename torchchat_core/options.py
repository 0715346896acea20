"""Options as dataclasses: one declaration for command-line flags, validation and documentation."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torchchat_core.errors import TorchchatError, did_you_mean, quoted

KEY = "torchchat"
Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class OptionDetail:
    """What is known of one option beside its name, type and default."""

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # exclusive minimum
    choices: tuple[str, ...] | None = None
    short: str | None = None  # "-d"

    @property
    def range(self) -> str | None:
        """The permitted values in words, such as "0 to 1"; None where all are permitted."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        if self.above is not None:
            return f"above {self.above:g}" + (f", at most {self.maximum:g}" if self.maximum is not None else "")
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{self.minimum:g} or more"
        return f"{self.maximum:g} or less" if self.maximum is not None else None


def option(default: Any, help: str, **detail: Any) -> Any:
    """A dataclass field that is an option; `detail` are the fields of `OptionDetail`."""
    metadata = {KEY: OptionDetail(help=help, **detail)}
    if isinstance(default, Mapping | list):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def detail_of(declared: Field[Any]) -> OptionDetail:
    """The detail of a field made with `option`."""
    detail = declared.metadata.get(KEY)
    if not isinstance(detail, OptionDetail):
        raise TorchchatError(f"the option {quoted(declared.name)} was not declared with torchchat_core.options.option")
    return detail


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    """The types of a class's fields: looking them up takes a millisecond, which a server does not have every time."""
    return get_type_hints(owner)


def value_type(owner: type, name: str) -> type:
    """The type of an option's values, `None` apart: int, float, bool, str, tuple or dict."""
    hint = _hints(owner)[name]
    members = [member for member in get_args(hint) if member is not type(None)]
    chosen: type = members[0] if type(None) in get_args(hint) else hint
    return get_origin(chosen) or chosen


def validate(options: Any) -> None:
    """Checks every field of an options dataclass. Raises `TorchchatError` with the name, the value and the range."""
    for declared in fields(options):
        check_value(type(options), declared, getattr(options, declared.name))


@functools.cache
def _accepted(owner: type, name: str) -> tuple[type, tuple[type, ...]]:
    """The type of an option's values as an error says it, and all that they may be."""
    wanted = value_type(owner, name)
    optional = type(None) in get_args(_hints(owner)[name])
    return wanted, ((int, float) if wanted is float else (wanted,)) + ((type(None),) if optional else ())


def check_value(owner: type, declared: Field[Any], value: Any, named: str | None = None) -> None:
    """Check one value against the declaration of its field in `owner`; errors call it `named`, such as "--top-k"."""
    named = named or declared.name
    detail = detail_of(declared)
    wanted, accepted = _accepted(owner, declared.name)
    if value is None and type(None) in accepted:
        return
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise TorchchatError(f"{named} is {quoted(value)}; it has to be {_type_words(wanted)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _out_of_range(named, value, detail)
    if isinstance(value, int | float) and not isinstance(value, bool):
        low = detail.minimum is not None and value < detail.minimum
        high = detail.maximum is not None and value > detail.maximum
        if low or high or (detail.above is not None and value <= detail.above):
            raise _out_of_range(named, value, detail)
    if detail.choices is not None and value not in detail.choices:
        raise TorchchatError(f"{named} is {quoted(value)}; it has to be {detail.range}",
                             did_you_mean(str(value), detail.choices))


def from_mapping(owner: type[Options], values: Mapping[str, Any]) -> Options:
    """Options from a dictionary such as JSON gives. Raises `TorchchatError` for an unknown key or a wrong value."""
    known = {declared.name: declared for declared in fields(owner)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise TorchchatError(f"there is no option {quoted(name)}; known are {', '.join(known)}",
                                 did_you_mean(name, known))
    converted = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    made = owner(**converted)
    validate(made)
    return made


def from_text(owner: type, name: str, text: str, named: str | None = None) -> Any:
    """Parse `text`, as a user typed it, into the value of an option. Raises `TorchchatError` if it is invalid.

    Errors call the option `named`, such as "--top-k".
    """
    known: Sequence[Field[Any]] = fields(owner)
    declared = next((declared for declared in known if declared.name == name.replace("-", "_")), None)
    if declared is None:
        names = [each.name for each in known]
        raise TorchchatError(f"there is no option {quoted(name)}; known are {', '.join(names)}",
                             did_you_mean(name, names))
    wanted = value_type(owner, declared.name)
    if text == "none" and type(None) in get_args(_hints(owner)[declared.name]):
        return None
    try:
        value = _PARSERS[wanted](text)
    except (ValueError, KeyError):
        raise TorchchatError(f"{named or declared.name} is {quoted(text)}; it has to be {_type_words(wanted)}"
                             ) from None
    check_value(owner, declared, value, named)
    return value


_PARSERS: dict[type, Any] = {
    int: int,
    float: float,
    str: str,
    bool: {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}.__getitem__,
    tuple: lambda text: (text,),
}


def _type_words(wanted: type) -> str:
    return {int: "a whole number", float: "a number", bool: "on or off", str: "a text",
            tuple: "a list"}.get(wanted, f"a {wanted.__name__}")


def _out_of_range(name: str, value: object, detail: OptionDetail) -> TorchchatError:
    return TorchchatError(f"{name} is {quoted(value)}; it has to be {detail.range or 'a finite number'}")
