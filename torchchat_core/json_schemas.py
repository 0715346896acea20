"""JSON Schemas of strangers, as llguidance can be given them: without bounds that it gets wrong, or spends its life on.

A schema is walked as what it is: `{"properties": {"minimum": ...}}` has a property of that name, and no bound. What
stands under keys that are not known is looked at too: a reference may lead there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from torchchat_core.errors import TorchchatError, quoted

# Between the parts of a JSON text: a space, or a newline and its indentation. Without a limit, small models would write
# white space forever.
WHITE_SPACE = r"(\x20|\x0A[\x20]{0,32})"
LITERAL_KEYS = ("const", "enum", "default", "examples")  # of schemas: what they hold is data
NAMED_KEYS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
LARGEST = 2.0**53  # of these: beyond it, JSON's numbers are not told from their neighbours
LARGEST_MULTIPLE = 10_000  # of all `multipleOf` together: the work grows with it, some seconds for a million
NEXT_TO = 1e-12  # how near a number may come to a bound that is excluded


def enforceable(schema: Any) -> Any:
    """The schema in a form that is enforced as it says, but for numbers within 1e-12 of a bound that is excluded.

    Raises `TorchchatError` for bounds that cannot be, and for a reference to what is not looked at here.
    """
    made, multiples = copy.deepcopy(schema), list[Decimal]()
    for node in _schemas(made):
        for name in NUMBERS:
            if not abs(_number(node, name) or 0) <= LARGEST:
                raise TorchchatError(f"{name} is {quoted(node[name])}; numbers beyond 2^53 are not enforced")
        for name in REFERENCES:
            _check_reference(node.get(name))
        multiple = _number(node, "multipleOf")
        if multiple is not None and multiple > 0:
            multiples.append(Decimal(repr(multiple)))
        if node.get("type") != "integer":
            _exclude(node, "exclusiveMinimum", "minimum", 1)
            _exclude(node, "exclusiveMaximum", "maximum", -1)
    _check_multiples(multiples)
    return made


def _number(node: dict[str, Any], name: str) -> int | float | None:
    value = node.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_reference(target: Any) -> None:
    """Raises `TorchchatError` for one that makes a schema of what is data elsewhere."""
    steps = iter(unquote(target.partition("#")[2]).split("/") if isinstance(target, str) else ())
    for step in steps:
        if step in NAMED_KEYS:
            next(steps, None)  # a name, which may be any
        elif step in LITERAL_KEYS:
            raise TorchchatError(f"the reference {quoted(target)} leads into {quoted(step)}, which holds data and no "
                                 "schema")


def _exclude(node: dict[str, Any], exclusive: str, inclusive: str, direction: int) -> None:
    """Says a bound that is a whole number, and excluded, by the number next to it: llguidance takes 5 to be above 5
    where the other bound is 5.5."""
    bound, other = _number(node, exclusive), _number(node, inclusive)
    if bound is None or bound != int(bound):
        return
    next_to = float(bound) + direction * max(NEXT_TO, abs(bound) * 1e-15)
    if other is not None:
        next_to = max(next_to, other) if direction > 0 else min(next_to, other)
    del node[exclusive]
    node[inclusive] = next_to


def _check_multiples(multiples: list[Decimal]) -> None:
    digits = max((-int(each.as_tuple().exponent) for each in multiples), default=0)
    together = math.lcm(*(int(each.scaleb(max(digits, 0))) for each in multiples))
    while together % 10 == 0 and together:  # which the last digits show
        together //= 10
    if together > LARGEST_MULTIPLE:
        raise TorchchatError(f"multipleOf is {', '.join(map(str, multiples))[:60]}; numbers are not kept to multiples "
                             f"of more than {LARGEST_MULTIPLE}, all in the schema taken together")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All that may be a schema in a schema, itself included."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, list):
            rest += node
        elif isinstance(node, dict):
            yield node
            for key, value in node.items():
                if key in NAMED_KEYS and isinstance(value, dict):
                    rest += value.values()
                elif key not in LITERAL_KEYS:
                    rest.append(value)
