"""Calls of functions in a model's answer: how the families of models write them.

    Hermes, Qwen 2.5, Qwen 3    <tool_call>{"name": "f", "arguments": {...}}</tool_call>, again and again
    Qwen 3 Coder                <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
    Mistral                     [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...] or [TOOL_CALLS]f[ARGS]{...}
    Llama 3                     the answer is {"name": "f", "parameters": {...}}; ...
    Granite 3                   <|tool_call|>[{"name": "f", "arguments": {...}}, ...]

Which of them it is, the chat template says that was made for the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from torchchat_core.json_schemas import LITERAL_KEYS, NAMED_KEYS
from torchchat_core.specs import Tokenizer

XML_CALL = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
XML_VALUE = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
MISTRAL_CALL = re.compile(r"\s*([\w.-]{1,64})(?:\[CALL_ID\][^\[]{0,64})?\[ARGS\]")
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolForm:
    """How one family writes calls."""

    name: str
    openers: tuple[str, ...]  # texts that begin a call; none: a call is all of an answer that begins with "{"
    arguments: str  # the key of the arguments
    closers: tuple[str, ...]  # texts between and behind calls
    opening: str = ""  # of an answer that has to be a call

    def marks(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens that an answer has to show for its calls to be found."""
        texts = (*self.openers, *self.closers, "[ARGS]", "[CALL_ID]")
        return frozenset(tokenizer.special_tokens[text] for text in texts if text in tokenizer.special_tokens)


HERMES = ToolForm("hermes", ("<tool_call>",), "arguments", ("</tool_call>",), "<tool_call>\n")
QWEN_XML = ToolForm("qwen-xml", ("<tool_call>",), "arguments", ("</tool_call>",))
MISTRAL = ToolForm("mistral", ("[TOOL_CALLS]",), "arguments", ())
LLAMA3 = ToolForm("llama3", ("<|python_tag|>",), "parameters", (";",))
GRANITE = ToolForm("granite", ("<|tool_call|>", "<tool_call>"), "arguments", ())


def tool_form(template: str) -> ToolForm | None:
    """The form that a chat template's source teaches its model, or None where it knows no tools."""
    if "tools" not in template:
        return None
    if "<function=" in template:
        return QWEN_XML
    if "<|tool_call|>" in template:
        return GRANITE
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template or "[AVAILABLE_TOOLS]" in template:
        return MISTRAL
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return LLAMA3
    return None


class ToolCallReader:
    """Takes the text of an answer as it comes; gives what is no call at once, and the calls at the end."""

    def __init__(self, form: ToolForm, names: Collection[str]) -> None:
        """`names`: of the functions; what looks like a call of another one is text."""
        self._form = form
        self._names = names
        self._held = ""
        self._in_call = False
        self._at_start = True

    def push(self, text: str) -> str:
        """What is certain to be no part of a call."""
        self._held += text
        if self._in_call:
            return ""
        if self._at_start and self._form is LLAMA3:
            beginning = self._held.lstrip()
            if not beginning:
                return ""
            self._at_start = False
            self._in_call = beginning.startswith("{")
            if self._in_call:
                return ""
        found = [at for opener in self._form.openers if (at := self._held.find(opener)) >= 0]
        if found:
            self._in_call = True
            return self._cut(min(found))
        return self._cut(len(self._held) - max((_overlap(self._held, opener) for opener in self._form.openers),
                                               default=0))

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls; where what looked like calls cannot be read, it is text."""
        calls = list(self._calls(self._held)) if self._in_call else []
        if calls and all(call.name in self._names for call in calls):
            return "", calls
        return self._held, []

    def _cut(self, size: int) -> str:
        certain, self._held = self._held[:size], self._held[size:]
        return certain

    def _calls(self, text: str) -> Iterator[ToolCall]:
        read: Callable[[str], Iterator[ToolCall]] = _read_xml if self._form is QWEN_XML else self._read_json
        yield from read(text)

    def _read_json(self, text: str) -> Iterator[ToolCall]:
        """JSON objects and lists of them, with openers and closers between them."""
        marks = (*self._form.openers, *self._form.closers)
        while text := _without(text, marks):
            named = MISTRAL_CALL.match(text) if self._form is MISTRAL else None
            try:
                value, end = _decoder.raw_decode(text, named.end() if named else 0)
            except (ValueError, RecursionError):
                return
            for each in value if isinstance(value, list) else [value]:
                call = ToolCall(named[1], json.dumps(each)) if named and isinstance(each, dict) else self._call(each)
                if call is None:
                    return
                yield call
            text = text[end:]

    def _call(self, value: object) -> ToolCall | None:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            return None
        other = "parameters" if self._form.arguments == "arguments" else "arguments"
        arguments = value.get(self._form.arguments, value.get(other, {}))
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def forced_schema(form: ToolForm, functions: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """The JSON Schema of one call of one of the functions, which are name -> schema of the arguments.

    Each schema of arguments is a definition of the whole, to which its own references lead: "#/$defs/a" becomes
    "#/$defs/call0/$defs/a".
    """
    names = {name: f"call{index}" for index, name in enumerate(functions)}  # pointers need no escapes then
    arguments = {names[name]: _moved(schema, f"#/$defs/{names[name]}") if schema else {"type": "object"}
                 for name, schema in functions.items()}
    calls = [{"type": "object", "properties": {"name": {"const": name},
                                               form.arguments: {"$ref": f"#/$defs/{names[name]}"}},
              "required": ["name", form.arguments], "additionalProperties": False} for name in functions]
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": arguments}


def _moved(schema: Mapping[str, Any], root: str) -> Any:
    """A schema whose references to itself lead to another root: pointers, anchors, and those that begin with its $id.

    It has neither $id nor anchors then, which two schemas could have in common. What lies within another $id is a
    document of its own, and stays as it is.
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
    """Whether it has a name of its own; "#name", as older drafts have it, is an anchor."""
    name = schema.get("$id")
    return isinstance(name, str) and not name.startswith("#")


def _anchors(schema: Any, place: str, outermost: bool = True) -> Iterator[tuple[str, str]]:
    """The anchors of a document, each with the pointer to where it stands."""
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


def read_forced(form: ToolForm, text: str) -> list[ToolCall]:
    """The call that an answer of `forced_schema` is; none where it was cut off."""
    reader = ToolCallReader(form, ())
    call = reader._call(_parsed(text))
    return [call] if call is not None else []


def _read_xml(text: str) -> Iterator[ToolCall]:
    for found in XML_CALL.finditer(text):
        values = {key: _value(value) for key, value in XML_VALUE.findall(found[2])}
        yield ToolCall(found[1], json.dumps(values, ensure_ascii=False))


def _value(text: str) -> Any:
    """A value of the XML form: JSON where it is such, else the text itself."""
    value = _parsed(text)
    return text if value is None and text.strip() != "null" else value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without(text: str, marks: tuple[str, ...]) -> str:
    """The text without white space and marks before it."""
    text = text.lstrip()
    while (mark := next((mark for mark in marks if text.startswith(mark)), None)) is not None:
        text = text[len(mark) :].lstrip()
    return text


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that is a beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
