"""The flags that say what text a model is measured on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torchchat_core.cli.values import Number
from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.measure.text import MeasuredText

Function = TypeVar("Function", bound=Callable[..., Any])


class Characters(click.ParamType[int]):
    """How many characters: a number, or all."""

    name = "number"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if value == "all":
            return sys.maxsize
        if isinstance(value, int):
            return value
        return int(Number(minimum=1).convert(value, parameter, context))


def text_flags(characters: int) -> Callable[[Function], Function]:
    """--file, --characters and --window, all None where they are not given; `characters`: the default, for the help."""

    def decorate(function: Function) -> Function:
        for option in reversed([
            click.option("--file", metavar="TEXT", help="The UTF-8 text to measure on [default: one that comes with "
                                                        "torchchat]."),
            click.option("--characters", type=Characters(), metavar="N",
                         help=f"Number of characters to measure from the start, or all [default: {characters}]."),
            click.option("--window", type=Number(minimum=2), metavar="N",
                         help="Tokens that the model sees at once [default: 256, or what the model takes]."),
        ]):
            function = option(function)
        return function

    return decorate


def text_of(flags: Mapping[str, Any], characters: int) -> MeasuredText:
    """The text that the flags ask for, with so many characters where they do not say.

    Raises `TorchchatError` as `measured_text` does.
    """
    from torchchat_core.measure.text import measured_text

    path = expanded(flags["file"]) if flags["file"] is not None else None
    try:
        return measured_text(path, flags["characters"] or characters)
    except TorchchatError as error:
        raise TorchchatError(f"--file: {error.message}" if path is not None else error.message, error.fix) from None
