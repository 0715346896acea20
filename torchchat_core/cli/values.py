"""Parse and check the values of flags before any model is loaded. Each `UsageError` names the flag."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from torchchat_core.errors import TorchchatError, UsageError, quoted
from torchchat_core.options import OptionDetail, from_text
from torchchat_core.plugins import Registry
from torchchat_core.run_options import DEVICES, DTYPE_NAMES, check_device, check_dtype
from torchchat_core.small_files import expanded, is_file
from torchchat_core.specs import ExecutorInfo


def flag_name(parameter: click.Parameter | None) -> str:
    """Return the parameter as a user types it: its longest flag, or the metavar of an argument."""
    if parameter is None:
        return "the value"
    if isinstance(parameter, click.Argument):
        return (parameter.metavar or parameter.name or "").strip("[].").upper()
    return max(parameter.opts, key=len)


class Number(click.ParamType[Any]):
    """A whole number within bounds; any finite number if `kind` is float."""

    name = "number"

    def __init__(self, kind: type[int] | type[float] = int, minimum: float | None = None,
                 maximum: float | None = None, above: float | None = None) -> None:
        self._kind = kind
        self._detail = OptionDetail(help="", minimum=minimum, maximum=maximum, above=above)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None  # noqa: ARG002
                ) -> int | float:
        try:
            found = self._kind(value)
        except (ValueError, OverflowError):
            raise self._fault(value, parameter) from None
        low = self._detail.minimum is not None and found < self._detail.minimum
        high = self._detail.maximum is not None and found > self._detail.maximum
        below = self._detail.above is not None and found <= self._detail.above
        if low or high or below or not math.isfinite(found):
            raise self._fault(value, parameter)
        return found

    def _fault(self, value: object, parameter: click.Parameter | None) -> UsageError:
        what = "a whole number" if self._kind is int else "a number"
        bounds = self._detail.range
        words = what if bounds is None else f"{what} from {bounds}" if " to " in bounds \
            else f"{what} {bounds}" if bounds.startswith("above") else f"{what}, {bounds}"
        return UsageError(f"{flag_name(parameter)} is {quoted(value)}; expected {words}")


class OptionValue(click.ParamType[Any]):
    """The value of one field of an options dataclass."""

    def __init__(self, owner: type, field: str, name: str = "value") -> None:
        self._owner, self._field, self.name = owner, field, name

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None  # noqa: ARG002
                ) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return from_text(self._owner, self._field, value, flag_name(parameter))
        except TorchchatError as error:
            raise UsageError(error.message, error.fix) from None


class Checked(click.ParamType[str]):
    """A string that a function checks, such as the name of a device."""

    name = "text"

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None  # noqa: ARG002
                ) -> str:
        try:
            self._check(str(value))
        except TorchchatError as error:
            raise UsageError(f"{flag_name(parameter)}: {error.message}", error.fix) from None
        return str(value)


class CheckedByRegistry(click.ParamType[str]):
    """A name that a function checks against the registry. `bench` also accepts "all"."""

    name = "text"

    def __init__(self, check: Callable[[str, Registry], None]) -> None:
        self._check = check

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        registry = context.find_root().obj if context is not None else None
        if isinstance(registry, Registry) and not (value == "all" and context and context.command.name == "bench"):
            try:
                self._check(str(value), registry)
            except TorchchatError as error:
                # A fault in a file's content is not a usage error.
                kind = TorchchatError if is_file(expanded(str(value))) else UsageError
                raise kind(f"{flag_name(parameter)}: {error.message}", error.fix) from None
        return str(value)


def _check_executor(name: str, registry: Registry) -> None:
    if name != "auto":
        registry.find(ExecutorInfo, name)


def _check_recipe(text: str, registry: Registry) -> None:
    from torchchat_core.quantization.recipe import parse_recipe

    recipe = parse_recipe(text, registry)
    if recipe.device is not None:
        check_device(recipe.device, '"executor": {{"accelerator": "{}"}} in the recipe')
    if recipe.dtype is not None:
        check_dtype(recipe.dtype, suggested='"precision": {{"dtype": "{}"}} in the recipe')
    device = recipe.device if recipe.device in DEVICES else "cpu"
    recipe.steps(registry, device, DTYPE_NAMES.get(recipe.dtype or "", "fp32"))  # checks the sections' options


def _check_stop(text: str) -> None:
    if not text:
        raise TorchchatError("a stop string is empty; it would end every answer immediately")


EXECUTOR = CheckedByRegistry(_check_executor)
RECIPE = CheckedByRegistry(_check_recipe)
STOP = Checked(_check_stop)
DEVICE = Checked(check_device)
DTYPE = Checked(check_dtype)
STORED_DTYPE = Checked(lambda name: check_dtype(name, fast=False))
