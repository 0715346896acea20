"""JSON Schemas of strangers, as llguidance can be given them: without bounds that it gets wrong, or spends its life on.

A schema is walked as what it is: `{"properties": {"minimum": ...}}` has a property of that name, and no bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from torchchat_core.errors import TorchchatError

BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}  # name -> schema
SCHEMAS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}  # lists of schemas; the last one may also be
SCHEMA = {"items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
          "unevaluatedItems", "unevaluatedProperties"}  # a schema
LARGEST = 2.0**53  # of a bound: beyond it, JSON's numbers are not told from their neighbours
LARGEST_MULTIPLE = 10_000  # of all `multipleOf` together: the work grows with it, some seconds for a million
NEXT_TO = 1e-12  # how near a number may come to a bound that is excluded


def enforceable(schema: Any) -> Any:
    """The schema in a form that is enforced as it says, but for numbers within 1e-12 of a bound that is excluded.

    Raises `TorchchatError` for bounds that cannot be.
    """
    made, multiples = _copied(schema), list[Decimal]()
    for node in _schemas(made):
        for name in BOUNDS | {"multipleOf"}:
            value = node.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= LARGEST:
                raise TorchchatError(f"{name} is {value!r:.40}; numbers beyond 2^53 are not enforced")
        multiple = node.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool) and multiple > 0:
            multiples.append(Decimal(repr(multiple)))
        if node.get("type") != "integer":
            _exclude(node, "exclusiveMinimum", "minimum", 1)
            _exclude(node, "exclusiveMaximum", "maximum", -1)
    _check_multiples(multiples)
    return made


def _exclude(node: dict[str, Any], exclusive: str, inclusive: str, direction: int) -> None:
    """Says a bound that is a whole number, and excluded, by the number next to it: llguidance takes 5 to be above 5
    where the other bound is 5.5."""
    bound = node.get(exclusive)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or bound != int(bound):
        return
    next_to = float(bound) + direction * max(NEXT_TO, abs(bound) * 1e-15)
    other = node.get(inclusive)
    if isinstance(other, int | float) and not isinstance(other, bool):
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


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas in a schema, itself included."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if not isinstance(node, dict):
            continue
        yield node
        for key, value in node.items():
            if key in OF_SCHEMAS and isinstance(value, dict):
                rest += value.values()
            elif key in SCHEMAS and isinstance(value, list):
                rest += value
            elif key in SCHEMA:
                rest.append(value)
