"""List the attributes that chat templates may access for each type, and the guard that runs before each method.

Methods and attributes that are not listed here are rejected, even if Jinja's sandbox would allow them. A guard checks
the arguments before the method runs, and raises `TorchchatError` if the call could take too much time or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Cycler, Namespace

from torchchat_core.template_limits import Budget

Arguments = tuple[Any, ...]
# Takes the value, positional and named arguments; returns the positional ones to call with.
Guard = Callable[[Budget, Any, Arguments, Mapping[str, Any]], Arguments]


def _free(_: Budget, __: Any, arguments: Arguments, ___: Mapping[str, Any]) -> Arguments:
    """Allow a method whose time and result are proportional to the value."""
    return arguments


def _comparing(limits: Budget, value: Any, arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    """Check the size of values that are compared with each other or formatted in an error."""
    limits.bounded(value, *arguments, *named.values())
    return arguments


def _hashing(limits: Budget, _: Any, arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    limits.bounded(*arguments, *named.values())
    return arguments


def _searching(limits: Budget, text: str, arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    """Limit searches whose time can be the product of both lengths: from the right, or for sets of characters."""
    for sought in (*arguments, *named.values()):
        if isinstance(sought, str):
            limits.need_search(len(text), len(sought))
    return arguments


def _replacing(limits: Budget, text: str, arguments: Arguments, _: Mapping[str, Any]) -> Arguments:
    if len(arguments) >= 2:
        limits.check_replacement(text, arguments[0], arguments[1])
    return arguments


def _joining(limits: Budget, separator: str, arguments: Arguments, _: Mapping[str, Any]) -> Arguments:
    return (limits.joinable(arguments[0], separator), *arguments[1:]) if arguments else arguments


def _formatting(limits: Budget, text: str, arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    limits.check_brace_format(text, [*arguments, *named.values()])
    return arguments


def _guarded(names: str, guard: Guard) -> dict[str, Guard]:
    return dict.fromkeys(names.split(), guard)


TEXT_METHODS: Mapping[str, Guard] = {
    **_guarded("capitalize casefold isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle "
               "isupper lower splitlines swapcase title upper", _free),
    # Forward searches of CPython take time in proportion to the sum of both lengths.
    **_guarded("count endswith find index partition removeprefix removesuffix split startswith", _free),
    **_guarded("lstrip rfind rindex rpartition rsplit rstrip strip", _searching),
    **_guarded("format format_map", _formatting),
    "join": _joining, "replace": _replacing,
}
LIST_METHODS: Mapping[str, Guard] = {**_guarded("count index", _comparing), "copy": _free}
MAPPING_METHODS: Mapping[str, Guard] = {**_guarded("copy items keys values", _free), "get": _hashing}
LOOP_METHODS: Mapping[str, Guard] = {"changed": _comparing, "cycle": _free}
CYCLER_METHODS: Mapping[str, Guard] = {"next": _free, "reset": _free}

# For each type (the first match counts): methods with their guards, and plain attributes.
ATTRIBUTES: tuple[tuple[type | tuple[type, ...], Mapping[str, Guard], frozenset[str]], ...] = (
    (str, TEXT_METHODS, frozenset()),
    ((list, tuple), LIST_METHODS, frozenset()),
    (Mapping, MAPPING_METHODS, frozenset()),
    (int, {"bit_length": _free, "is_integer": _free}, frozenset()),
    (float, {"is_integer": _free}, frozenset()),
    (LoopContext, LOOP_METHODS, frozenset(["depth", "depth0", "first", "index", "index0", "last", "length", "nextitem",
                                           "previtem", "revindex", "revindex0"])),
    (Cycler, CYCLER_METHODS, frozenset(["current"])),
    (Macro, {}, frozenset(["arguments", "caller", "catch_kwargs", "catch_varargs", "name"])),
)


def can_read(value: object, attribute: str) -> bool:
    """Return True if a template may read the attribute of a value."""
    if isinstance(value, Namespace):
        return True  # its attributes come from the template itself
    return next((attribute in methods or attribute in plain
                 for kind, methods, plain in ATTRIBUTES if isinstance(value, kind)), False)


def guarded_arguments(limits: Budget, method: Any, arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    """Run the guard of a bound method; return the arguments to call it with. Other callables have none."""
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    for kind, methods, _ in ATTRIBUTES:
        if isinstance(owner, kind):
            guard = methods.get(name)
            return arguments if guard is None else guard(limits, owner, arguments, named)
    return arguments
