"""Work with the JSON Schemas of function arguments: for a whole call, and for values that are not written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import quote

from torchchat_core.json_schemas import LITERAL_KEYS, NAMED_KEYS

KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object",
         type(None): "null"}
SPELLINGS = {"True": True, "False": False, "None": None}  # Python literals that templates and models write
MAX_REFERENCES = 8  # followed in a chain
MAX_LEVELS = 100  # of nested lists and objects in arguments


def forced_schema(key: str, functions: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return the JSON Schema of one call of one of the functions.

    `key` is the key of the arguments; `functions` maps names to schemas of arguments. Each schema becomes a definition,
    and its references are adjusted: "#/$defs/a" becomes "#/$defs/call0/$defs/a".
    """
    names = {name: f"call{index}" for index, name in enumerate(functions)}  # so that pointers need no escapes
    arguments = {names[name]: _moved(schema, f"#/$defs/{names[name]}") if schema else {"type": "object"}
                 for name, schema in functions.items()}
    calls = [{"type": "object", "properties": {"name": {"const": name},
                                               key: {"$ref": f"#/$defs/{names[name]}"}},
              "required": ["name", key], "additionalProperties": False} for name in functions]
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": arguments}


def _moved(schema: Mapping[str, Any], root: str) -> Any:
    """Return a schema with its internal references moved to another root: pointers, anchors, and its own $id.

    The result has no $id and no anchors, which could clash with those of other schemas. A part with a different $id is
    a separate document and is not changed.
    """
    own = schema.get("$id")
    targets = {f"#{name}": place for name, place in _anchors(schema, root)}

    def reference(target: str) -> str:
        if isinstance(own, str) and own.partition("#")[0] and target.partition("#")[0] == own.partition("#")[0]:
            target = "#" + target.partition("#")[2]
        if target == "#" or target.startswith("#/"):
            return root + target[1:]
        return targets.get(target, target)

    def moved(part: Any, outermost: bool = False) -> Any:
        if isinstance(part, list):
            return [moved(each) for each in part]
        if not isinstance(part, Mapping) or (_is_document(part) and not outermost):
            return part
        found: dict[str, Any] = {}
        for key, value in part.items():
            if key == "$ref" and isinstance(value, str):
                found[key] = reference(value)
            elif key in NAMED_KEYS and isinstance(value, Mapping):
                found[key] = {name: moved(inner) for name, inner in value.items()}
            elif key not in ("$id", "$anchor"):
                found[key] = value if key in LITERAL_KEYS else moved(value)
        return found

    return moved(schema, outermost=True)


def _is_document(schema: Mapping[str, Any]) -> bool:
    """Return True if the schema has its own $id; "#name" is an anchor in older drafts."""
    name = schema.get("$id")
    return isinstance(name, str) and not name.startswith("#")


def _anchors(schema: Any, place: str, outermost: bool = True) -> Iterator[tuple[str, str]]:
    """Yield the anchors of a document, each with the pointer to its location."""
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from _anchors(each, f"{place}/{index}", outermost=False)
    elif isinstance(schema, Mapping) and (outermost or not _is_document(schema)):
        anchor, old_anchor = schema.get("$anchor"), schema.get("$id")
        if isinstance(anchor, str):
            yield anchor, place
        if isinstance(old_anchor, str) and old_anchor.startswith("#"):
            yield old_anchor[1:], place
        for key, value in schema.items():
            if key in NAMED_KEYS and isinstance(value, Mapping):
                for name, inner in value.items():
                    step = quote(name.replace("~", "~0").replace("/", "~1"))
                    yield from _anchors(inner, f"{place}/{key}/{step}", outermost=False)
            elif key not in LITERAL_KEYS:
                yield from _anchors(value, f"{place}/{quote(key)}", outermost=False)


def typed_value(text: str, name: str, schema: Mapping[str, Any]) -> Any:
    """Convert `text`, which a model wrote for the argument `name`, to a type that `schema` (of all arguments) permits.

    The text stays a string if the schema permits strings and the text is not of another permitted type. If the schema
    states no type, the text is parsed as JSON.
    """
    properties = schema.get("properties")
    kinds = value_kinds(properties.get(name) if isinstance(properties, Mapping) else None, schema)
    try:
        value = SPELLINGS[text] if kinds is not None and text in SPELLINGS else read_json_value(text)
    except ValueError:
        return text
    if kinds is None:
        return value
    kind = KINDS[type(value)]
    return value if kind != "string" and (kind in kinds or (kind == "integer" and "number" in kinds) or
                                          "string" not in kinds) else text


def read_json_value(text: str) -> Any:
    """Return the value of a JSON text. Raises `ValueError` for NaN and infinities, and for more than 100 levels."""
    try:
        value = json.loads(text, parse_constant=_not_json)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [inner for each in level if isinstance(each, dict | list)
                 for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def value_kinds(schema: object, root: Mapping[str, Any], depth: int = 0) -> frozenset[str] | None:
    """Return the JSON types that a part of the schema `root` permits, or None if it states none."""
    if not isinstance(schema, Mapping) or depth > MAX_REFERENCES:
        return None
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return frozenset([kinds])
    if isinstance(kinds, list):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    if isinstance(schema.get("$ref"), str):
        return value_kinds(_target(schema["$ref"], root), root, depth + 1)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset(KINDS[type(value)] for value in values)
    alternatives = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(alternatives, list):
        found = [value_kinds(each, root, depth + 1) for each in alternatives]
        return None if None in found else frozenset().union(*(kinds for kinds in found if kinds is not None))
    return None


def resolved(schema: object, root: Mapping[str, Any], depth: int = 0) -> Mapping[str, Any]:
    """Follow a reference to a definition in `root`, and return the schema. Other schemas are returned unchanged."""
    if not isinstance(schema, Mapping):
        return {}
    target = _target(schema["$ref"], root) if isinstance(schema.get("$ref"), str) else None
    return schema if target is None or depth > MAX_REFERENCES else resolved(target, root, depth + 1)


def _target(reference: str, root: Mapping[str, Any]) -> object:
    """Return the definition that "#/$defs/NAME" refers to, or None for other kinds of references."""
    for key in ("$defs", "definitions"):
        named = root.get(key)
        if reference.startswith(f"#/{key}/") and isinstance(named, Mapping):
            return named.get(reference.removeprefix(f"#/{key}/"))
    return None
