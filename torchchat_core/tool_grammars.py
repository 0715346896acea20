"""Build grammars for the text after the opener of a call, whose arguments are constrained by a JSON Schema.

A text can mention an opener without making a call. So the text after it is unconstrained until it starts like a call of
one of the functions; `torchchat_core.constraints.CallConstraint` applies the grammar from there to the end of the call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.generation_options import CallGrammar, Grammar
from torchchat_core.json_schemas import WHITE_SPACE, enforceable
from torchchat_core.specs import Tokenizer
from torchchat_core.tool_calls import MISTRAL, ToolForm
from torchchat_core.tool_schemas import forced_schema, resolved, value_kinds

LONGEST_COUNTED = 4096  # largest minLength or maxLength that is enforced in the XML form
RULES = r"""
BLANK: /[ \t\r\n]+/
REST: /(.|\n)+/
"""
Schema = Mapping[str, Any]
Functions = Mapping[str, Schema | None]


def call_grammar(form: ToolForm, functions: Functions, tokenizer: Tokenizer) -> CallGrammar:
    """Return the grammar for calls in `form`. `functions` maps names to schemas of arguments.

    Raises `TorchchatError` for a schema that cannot be enforced in this form.
    """
    names = "|".join(map(re.escape, functions))
    if form.style == "xml":
        begins, rules = rf"\s*<function=({names})>", _xml(functions)
    elif form.style == "function":
        begins, rules = rf"\s*({names})>", _named(functions, '">"')
    elif form.style == "named":
        begins, rules = rf"\s*([\[{{]|({names})\[(ARGS|CALL_ID)\])", _mistral(functions, tokenizer)
    else:
        # Without an opener, an answer may be another JSON object.
        begins = rf'\s*\{{\s*"(name"\s*:\s*"({names})"|type"\s*:\s*"function")' if form.bare else r"\s*[\[{]"
        rules = f"start: BLANK? {'(call | list)' if form.lists else 'call'} REST?\n{_calls(form, functions)}"
    return CallGrammar(form, tuple(functions), begins, Grammar("lark", rules + RULES))


def _calls(form: ToolForm, functions: Functions, more: Schema | None = None) -> str:
    """Return rules for a call as JSON and for a list of calls. `more` has additional properties of a call."""
    schema = forced_schema(form.arguments, functions)
    for call in schema.get("anyOf", [schema]):
        call["properties"] = {"type": {"const": "function"}, **call["properties"], **(more or {})}
    return f'call: {_json(schema)}\nlist: "[" BLANK? call (BLANK? "," BLANK? call)* BLANK? "]"\n'


def _json(schema: Schema) -> str:
    enforced = enforceable(dict(schema))
    return f"%json {json.dumps({**enforced, 'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}"


def _literal(text: str) -> str:
    """Return a regular expression that matches exactly the text."""
    return re.sub(r"[^A-Za-z0-9_]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)


def _named(functions: Functions, separator: str, others: str = "") -> str:
    """Return rules for a name, `separator` (an expression) and an object, or one of `others`."""
    calls = " | ".join(f"{json.dumps(name)} {separator} BLANK? arguments{index}"
                       for index, name in enumerate(functions))
    return f"start: BLANK? ({others}{calls}) REST?\n" + "".join(
        f"arguments{index}: {_json(schema or {'type': 'object'})}\n" for index, schema in enumerate(functions.values()))


def _mistral(functions: Functions, tokenizer: Tokenizer) -> str:
    """Return rules for a list of calls, or for a name, [ARGS] and an object."""
    def mark(text: str) -> str:
        token = tokenizer.special_tokens.get(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    separator = f'({mark("[CALL_ID]")} /[A-Za-z0-9]{{1,64}}/)? {mark("[ARGS]")}'
    return _named(functions, separator, "call | list | ") + _calls(
        MISTRAL, functions, {"id": {"type": "string", "maxLength": 64}})


# ---- the XML form --------------------------------------------------------------------------------------------------


def _xml(functions: Functions) -> str:
    """Return rules for <function=NAME> with a <parameter=NAME> for each argument, in the order of the schema."""
    rules: list[str] = []
    calls: list[str] = []
    for index, (name, schema) in enumerate(functions.items()):
        parameters = _parameters(f"p{index}x", name, schema or {}, rules)
        calls.append(f'{json.dumps(f"<function={name}>")} BLANK? {parameters} "</function>"')
    rules.append('value[lazy]: /(.|\\n)*/ "</parameter>"')
    return f"start: BLANK? ({' | '.join(calls)}) REST?\n" + "\n".join(rules)


def _parameters(prefix: str, function: str, schema: Schema, rules: list[str]) -> str:
    """Return the expression for a function's parameters, and add the rules that it uses to `rules`."""
    root = resolved(schema, schema)
    properties = root.get("properties", {})
    if not isinstance(properties, Mapping) or any(key in root for key in ("anyOf", "oneOf", "allOf", "$ref")):
        raise TorchchatError(f"the parameters of {quoted(function)} cannot be enforced in this model's call format; "
                             "expected a JSON Schema of an object with only \"properties\"")
    required = root.get("required", [])
    parts = []
    for index, (name, value) in enumerate(properties.items()):
        if not re.fullmatch(r"[^>\n]{1,200}", name):
            raise TorchchatError(f"the parameter {quoted(name)} of {quoted(function)} cannot be written in this "
                                 "model's call format; expected 1 to 200 characters without \">\" and line breaks")
        rules.append(f'{prefix}{index}: {json.dumps(f"<parameter={name}>")} '
                     f"{_value(f'{prefix}{index}v', value, schema, rules)} BLANK?")
        parts.append(f"{prefix}{index}" + ("" if name in required else "?"))
    if root.get("additionalProperties", True) is not False:
        known = "|".join(map(_literal, properties))
        rules.append(f"{prefix.upper()}NAME: /[^>\\n]{{1,200}}/" + (f" & ~(/{known}/)" if known else ""))
        rules.append(f'{prefix}more: "<parameter=" {prefix.upper()}NAME ">" value BLANK?')
        parts.append(f"{prefix}more*")
    return " ".join(parts)


def _value(rule: str, value: Any, root: Schema, rules: list[str]) -> str:
    """Return the expression for a value and the end of its parameter."""
    found = resolved(value, root)
    kinds = value_kinds(value, root)
    choices = [found["const"]] if "const" in found else found.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return rf'"\n"? ({" | ".join(json.dumps(choice) for choice in choices)}) "\n"? "</parameter>"'
    if kinds is not None and "string" not in kinds:
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        rules.append(f"{rule}: {_json({**value, **definitions})}")
        return rf'"\n"? {rule} "\n"? "</parameter>"'
    least, most = found.get("minLength", 0), found.get("maxLength")
    if kinds == frozenset(["string"]) and (least or most is not None) and max(least, most or 0) <= LONGEST_COUNTED:
        rules.append(f'{rule}[lazy]: /\\n?(.|\\n){{{least},{"" if most is None else most}}}\\n?/ "</parameter>"')
        return rule
    return "value"
