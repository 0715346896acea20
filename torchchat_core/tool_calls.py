"""Find function calls in a model's answer, in the formats of the model families.

    hermes         <tool_call>{"name": "f", "arguments": {...}}</tool_call>, repeated       Hermes, Qwen 2.5, Qwen 3
    qwen-xml       <tool_call><function=f><parameter=a>1</parameter></function></tool_call>  Qwen 3 Coder
    function-json  <function=f>{...}</function>                                              functionary, Llama
    mistral        [TOOL_CALLS][{"name": "f", "arguments": {...}}] or [TOOL_CALLS]f[ARGS]{...}
    llama3         the answer is {"name": "f", "parameters": {...}}; ...
    granite        <|tool_call|>[{"name": "f", "arguments": {...}}, ...]

`torchchat_core.tool_profiles` determines which of them a chat template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchchat_core.specs import Tokenizer
from torchchat_core.tool_schemas import read_json_value, typed_value

NAMED_CALL = re.compile(r"([\w.-]{1,64})(?:\[CALL_ID\][^\[]{0,64})?\[ARGS\]\s*")
NAMED_CALL_BEGINNING = re.compile(r"[\w.-]{0,64}(\[[A-Z_]{0,7}(\][^\[]{0,64}(\[[A-Z_]{0,4})?)?)?\]?\s*")
FUNCTION_NAME = re.compile(r"([\w.-]{1,64})>\s*")
FUNCTION_NAME_BEGINNING = re.compile(r"[\w.-]{0,64}>?\s*")
PARAMETER = re.compile(r"<parameter=([^>\n]{1,200})>\n?")
PARAMETER_BEGINNING = re.compile(r"<parameter=[^>\n]{0,200}>?")
WHITE_SPACE = re.compile(r"\s*")
BRACKETS = re.compile(r'["{}\[\]]')
STRING_END = re.compile(r'"|\\.?', re.DOTALL)
MAX_WASTED = 1 << 22  # characters parsed in failed candidates; after that, openers are treated as text
THINKING = {"<think>": "</think>", "<thinking>": "</thinking>", "<seed:think>": "</seed:think>",
            "[THINK]": "[/THINK]"}


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolForm:
    """How one family writes calls."""

    name: str
    openers: tuple[str, ...]  # texts that begin a call
    closers: tuple[str, ...] = ()  # texts between calls and after them
    arguments: str = "arguments"  # key of the arguments
    style: Literal["json", "named", "xml", "function"] = "json"
    lists: bool = False  # several calls are written as a list
    bare: bool = False  # an answer that starts with "{" can also be a call
    opening: str = ""  # of an answer that has to be a call

    def marks(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the control tokens whose text must be kept in an answer so that its calls can be found."""
        texts = (*self.openers, *self.closers, "[ARGS]", "[CALL_ID]", *THINKING, *THINKING.values())
        return frozenset(tokenizer.special_tokens[text] for text in texts if text in tokenizer.special_tokens)


HERMES = ToolForm("hermes", ("<tool_call>",), ("</tool_call>",), opening="<tool_call>\n")
QWEN_XML = ToolForm("qwen-xml", ("<tool_call>", "<function="), ("</tool_call>",), style="xml")
FUNCTION_JSON = ToolForm("function-json", ("<function=",), ("</function>",), style="function")
MISTRAL = ToolForm("mistral", ("[TOOL_CALLS]",), style="named", lists=True)
LLAMA3 = ToolForm("llama3", ("<|python_tag|>",), (";",), arguments="parameters", bare=True)
GRANITE = ToolForm("granite", ("<|tool_call|>", "<tool_call>"), ("<|/tool_call|>",), lists=True)
FORMS = (HERMES, QWEN_XML, FUNCTION_JSON, MISTRAL, GRANITE, LLAMA3)


def opened_thinking(prompt: str) -> str | None:
    """Return the tag at the end of a rendered prompt that opens the model's thinking, or None."""
    end = prompt[-200:].rstrip()
    return next((mark for mark in THINKING if end.endswith(mark)), None)


@dataclass
class _Candidate:
    """A possible call: the position of its opener, and how far its JSON was scanned."""

    start: int
    body: int  # after the opener
    scan: _JsonSpan | None = None


@dataclass(frozen=True)
class _Reading:
    """The result of parsing a candidate: its calls and where they end. A text that is not a call has no calls."""

    calls: tuple[ToolCall, ...] = ()
    end: int = 0


NO_CALL = _Reading()


class ToolCallReader:
    """Split a streamed answer into text and calls.

    Everything between thinking tags is text, and so are openers that are not followed by a call of a known function.
    Thinking is recognized at the beginning of an answer, after a call and after other thinking; in these positions,
    white space before a call is dropped.
    """

    def __init__(self, form: ToolForm, functions: Mapping[str, Mapping[str, Any] | None],
                 thinking: str | None = None) -> None:
        """`functions` maps names to JSON Schemas of arguments; `thinking` is the thinking tag that ends the prompt."""
        self.calls: list[ToolCall] = []
        self.candidates = 0  # possible calls found so far
        self._form = form
        self._functions = functions
        self._held = ""
        self._at = 0  # next position in the held text
        self._thinking_end = THINKING[thinking] if thinking else None
        self._candidate: _Candidate | None = None
        self._fresh = True  # only white space since the beginning, thinking or a call
        self._keeps_space = False  # white space is text even before a call
        self._in_block = False  # after a call whose opener may also apply to the next one
        self._wasted = 0
        self._opener = re.compile("|".join(map(re.escape, form.openers)))

    @property
    def opened(self) -> str | None:
        """The text after the opener of an unfinished candidate, else None."""
        return None if self._candidate is None else self._held[self._candidate.body:]

    def push(self, text: str) -> str:
        """Add a piece of the answer. Returns the text that is certainly not part of a call."""
        return self._advance(text, final=False)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the rest of the text, and all calls."""
        return self._advance("", final=True), self.calls

    def _advance(self, text: str, final: bool) -> str:
        self._held += text
        found: list[str] = []
        while self._at < len(self._held):
            if self._thinking_end is not None:
                piece = self._think(self._thinking_end, final)
            elif self._candidate is not None:
                piece = self._try_call(self._candidate, final)
            else:
                piece = self._read_fresh(final) if self._fresh else self._read_text(final)
            if piece is None:  # more text is needed to decide
                break
            found.append(piece)
        self._held, self._at, cut = self._held[self._at:], 0, self._at
        if self._candidate is not None and cut:
            self._candidate.start -= cut
            self._candidate.body -= cut
            if self._candidate.scan is not None:
                self._candidate.scan.at -= cut
        return "".join(found)

    def _until(self, end: int) -> str:
        text = self._held[self._at:end]
        self._at = end
        return text

    def _think(self, closer: str, final: bool) -> str | None:
        end = self._held.find(closer, self._at)
        if end >= 0:
            self._thinking_end, self._fresh, self._keeps_space = None, True, True
            return self._until(end + len(closer))
        return self._until(len(self._held) - (0 if final else _overlap(self._held, [closer]))) or None

    def _read_fresh(self, final: bool) -> str | None:
        """Parse the text after the beginning, thinking or a call."""
        start = WHITE_SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
        if self._keeps_space and start > self._at:
            return self._until(start)
        closers = self._form.closers if self._in_block else ()
        for closer in closers:
            if self._held.startswith(closer, start):
                self._at = start + len(closer)
                self._in_block = closer == ";"
                return ""
        if start == len(self._held):
            if not final:
                return None
            return self._drop_until(start) if self.calls else self._until(start)
        for mark, end in THINKING.items():
            if self._held.startswith(mark, start):
                self._thinking_end = end
                return self._until(start + len(mark))
        opener = self._opener.match(self._held, start)
        if opener is not None or self._begins_bare(start):
            self._open(start, start if opener is None else opener.end())
            return ""
        rest = self._held[start:start + 64]
        if not final and any(mark.startswith(rest) for mark in (*THINKING, *closers, *self._form.openers)):
            return None
        self._fresh = self._in_block = False
        return self._until(start)

    def _begins_bare(self, start: int) -> bool:
        return self._held.startswith("{", start) and (self._form.bare or (
            self._in_block and self._form.style == "json"))

    def _drop_until(self, end: int) -> str:
        self._at = end
        return ""

    def _read_text(self, final: bool) -> str | None:
        opener = self._opener.search(self._held, self._at) if self._wasted < MAX_WASTED else None
        if opener is not None:
            text = self._until(opener.start())
            self._open(opener.start(), opener.end())
            return text
        return self._until(len(self._held) - (0 if final else _overlap(self._held, self._form.openers))) or None

    def _open(self, start: int, body: int) -> None:
        if self._form.style == "xml" and self._held.startswith("<function=", start):
            body = start  # the opener is part of the call, as after <tool_call>
        self._candidate = _Candidate(start, body)
        self.candidates += 1

    def _try_call(self, candidate: _Candidate, final: bool) -> str | None:
        reading = self._read(candidate)
        if reading is None and not final:
            return None
        self._candidate = None
        if reading is not None and reading.calls and all(call.name in self._functions for call in reading.calls):
            self.calls += reading.calls
            self._at = reading.end
            self._fresh, self._keeps_space, self._in_block = True, False, True
            return ""
        self._fresh = self._in_block = False
        if reading is None:
            self._wasted += len(self._held) - self._at
        else:
            self._wasted += max(reading.end - self._at, 0)
        known_end = reading.end if reading is not None and reading.calls else 0
        return self._until(max(known_end, candidate.body, candidate.start + 1))

    # ---- parse the text after an opener; None if more text is needed to decide -------------------------------------

    def _read(self, candidate: _Candidate) -> _Reading | None:
        at = WHITE_SPACE.match(self._held, candidate.body).end()  # type: ignore[union-attr]
        if at == len(self._held):
            return None
        if self._form.style == "xml":
            return self._read_xml(at)
        if self._form.style == "function":
            return self._read_named(candidate, at, FUNCTION_NAME, FUNCTION_NAME_BEGINNING)
        if self._form.style == "named" and self._held[at] not in "[{":
            return self._read_named(candidate, at, NAMED_CALL, NAMED_CALL_BEGINNING)
        value, end = self._json(candidate, at)
        if end is None:
            return None
        entries = value if isinstance(value, list) else [value]
        calls = [called(self._form, entry) for entry in entries]
        return _Reading(tuple(call for call in calls if call is not None), end) if None not in calls else _Reading(
            (), end)

    def _read_named(self, candidate: _Candidate, at: int, name: re.Pattern[str], beginning: re.Pattern[str]
                    ) -> _Reading | None:
        """Read a name and the object of its arguments."""
        found = name.match(self._held, at)
        if found is None or found.end() == len(self._held):
            return None if found or beginning.fullmatch(self._held, at) else NO_CALL
        value, end = self._json(candidate, found.end())
        if end is None:
            return None
        if not isinstance(value, dict):
            return _Reading((), end)
        return _Reading((ToolCall(found[1], json_text(value)),), end)

    def _json(self, candidate: _Candidate, at: int) -> tuple[Any, int | None]:
        """Return the object or list at `at` and its end; the end is None if it is incomplete.

        The value is None if it is malformed, or neither an object nor a list.
        """
        if self._held[at] not in "[{":
            return None, at
        if candidate.scan is None:
            candidate.scan = _JsonSpan(at)
        end = candidate.scan.end(self._held)
        return (None, None) if end is None else (parsed(self._held[at:end]), end)

    def _read_xml(self, at: int) -> _Reading | None:
        if not self._held.startswith("<function=", at):
            return None if "<function=".startswith(self._held[at:at + 16]) else NO_CALL
        at += len("<function=")
        name = FUNCTION_NAME.match(self._held, at)
        if name is None:
            return None if FUNCTION_NAME_BEGINNING.fullmatch(self._held, at) else NO_CALL
        at = name.end()
        schema = self._functions.get(name[1]) or {}
        values: dict[str, Any] = {}
        while not self._held.startswith("</function>", at):
            parameter = PARAMETER.match(self._held, at)
            if parameter is None:
                rest = self._held[at:at + 300]
                more = PARAMETER_BEGINNING.fullmatch(rest) or any(
                    mark.startswith(rest) for mark in ("<parameter=", "</function>"))
                return None if more else _Reading((), at)
            end = self._held.find("</parameter>", parameter.end())
            if end < 0:
                return None
            values[parameter[1]] = typed_value(self._held[parameter.end():end].removesuffix("\n"), parameter[1], schema)
            at = WHITE_SPACE.match(self._held, end + len("</parameter>")).end()  # type: ignore[union-attr]
        return _Reading((ToolCall(name[1], json_text(values)),), at + len("</function>"))


class _JsonSpan:
    """Find the end of a JSON object or list in a growing text, without scanning any of it twice."""

    def __init__(self, start: int) -> None:
        self.at = start
        self._depth = 0
        self._in_string = False

    def end(self, text: str) -> int | None:
        """Return the position after the closing bracket, or None if it is not in the text yet."""
        while found := (STRING_END if self._in_string else BRACKETS).search(text, self.at):
            if found[0] == "\\":  # the escaped character has not arrived yet
                self.at = found.start()
                return None
            self.at = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            elif found[0] in "{[":
                self._depth += 1
            elif found[0] in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return self.at
        self.at = len(text)
        return None


def called(form: ToolForm, value: object) -> ToolCall | None:
    """Return the call that a JSON value describes, or None if it describes none."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    other = "parameters" if form.arguments == "arguments" else "arguments"
    arguments = value.get(form.arguments, value.get(other, {}))
    if isinstance(arguments, str):
        arguments = parsed(arguments)
    return ToolCall(value["name"], json_text(arguments)) if isinstance(arguments, dict) else None


def read_forced(form: ToolForm, text: str) -> list[ToolCall]:
    """Parse an answer that follows `forced_schema` into its call. A truncated answer has none."""
    call = called(form, parsed(text))
    return [call] if call is not None else []


def json_text(value: object) -> str:
    """Return `value` as JSON without escaping non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False)


def parsed(text: str) -> Any:
    """Return the value of a JSON text, or None if `read_json_value` rejects it."""
    try:
        return read_json_value(text)
    except ValueError:
        return None


def _overlap(text: str, marks: Iterable[str]) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of one of `marks`."""
    longest = 0
    for mark in marks:
        sizes = range(min(len(text), len(mark) - 1), longest, -1)
        longest = next((size for size in sizes if text.endswith(mark[:size])), longest)
    return longest
