"""Find out how a model writes function calls: render one with its chat template, and parse it."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import string
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.errors import TorchchatError
from torchchat_core.template_limits import TemplateStoppedError
from torchchat_core.tool_calls import (
    FORMS,
    FUNCTION_JSON,
    GRANITE,
    HERMES,
    LLAMA3,
    MISTRAL,
    QWEN_XML,
    ToolCall,
    ToolCallReader,
    ToolForm,
)

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
LETTERS = string.ascii_letters + string.digits
LONG_SAMPLE, SHORT_SAMPLE = "call_0123456789abcdef0123456789abcdef", "a1B2c3D4e"
QUESTION = "What does the probe say?"
ARGUMENTS: Mapping[str, Any] = {"text": "a b", "count": 3}
FUNCTION = {"type": "function", "function": {"name": "probe_of_calls", "description": "Probe.", "parameters": {
    "type": "object", "properties": {"text": {"type": "string", "description": "A text."},
                                     "count": {"type": "integer", "description": "A number."}},
    "required": ["text", "count"]}}}
NAME = "probe_of_calls"
MAX_STOPPED = 3
_profiles: weakref.WeakKeyDictionary[ChatTemplate, ToolProfile] = weakref.WeakKeyDictionary()
_random = random.Random()  # ids are no secrets


@dataclass(frozen=True)
class ToolProfile:
    """The way in which a chat template expects and writes function calls."""

    form: ToolForm | None = None  # None if unknown, or if the template does not write calls
    text_arguments: bool = False  # arguments are JSON strings, not objects
    null_content: bool = False  # the content of a message with calls and no text is null, not ""
    short_ids: bool = False  # call ids are nine letters and digits

    def new_id(self) -> str:
        """Return an id for a call."""
        if self.short_ids:
            return "".join(_random.choices(LETTERS, k=9))
        return f"call_{_random.getrandbits(128):032x}"

    def template_id(self, client_id: str) -> str:
        """Return the id that the template receives for a client's id. Equal ids stay equal."""
        if not self.short_ids or SHORT_ID.fullmatch(client_id):
            return client_id
        number = int.from_bytes(hashlib.sha256(client_id.encode("utf-8", "replace")).digest())
        return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(9))


def tool_profile(template: ChatTemplate | None) -> ToolProfile:
    """Return how `template` expects and writes calls. The result is cached for each template."""
    if template is None:
        return ToolProfile()
    found = _profiles.get(template)
    if found is None:
        found = _profiles[template] = _probed(template)
    return found


def _probed(template: ChatTemplate) -> ToolProfile:
    """Render a call in every way that templates may expect, and return the first profile that can be parsed."""
    if "tool" not in template.source + (template.tool_source or ""):
        return ToolProfile()
    written: list[tuple[ToolProfile, str]] = []
    stopped = 0
    for profile, messages in _conversations():
        try:
            text = _rendered(template, messages, add_generation_prompt=False)
            question = _rendered(template, messages[:1], add_generation_prompt=True) or ""
        except TemplateStoppedError:  # each attempt may take the whole time limit
            stopped += 1
            if stopped == MAX_STOPPED:
                break
            continue
        if text is None:
            continue
        answer = text[_shared(text, question):]
        form = _form_of(text[text.rfind(QUESTION) + len(QUESTION):], answer)
        if form is not None:
            return ToolProfile(form, profile.text_arguments, profile.null_content,
                               profile.short_ids or form is MISTRAL)
        written.append((profile, answer))
    naming = [profile for profile, text in written if NAME in text]
    if naming:
        return naming[0]
    if written:  # it does not render calls, so its form is unknown
        form = _hinted_form(template.tool_source or template.source)
        return ToolProfile(form, short_ids=written[0][0].short_ids or form is MISTRAL)
    return ToolProfile()


def _conversations() -> Iterator[tuple[ToolProfile, list[dict[str, Any]]]]:
    """Yield a question, a call and its result in every way that templates may expect, the usual one first."""
    for with_result, short_ids, null_content, text_arguments in itertools.product(
            (True, False), (False, True), (False, True), (False, True)):
        number = SHORT_SAMPLE if short_ids else LONG_SAMPLE
        call = {"id": number, "type": "function", "function": {
            "name": NAME, "arguments": json.dumps(ARGUMENTS) if text_arguments else dict(ARGUMENTS)}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": None if null_content else "", "tool_calls": [call]}]
        if with_result:
            messages.append({"role": "tool", "tool_call_id": number, "name": "probe", "content": "done"})
        yield ToolProfile(None, text_arguments, null_content, short_ids), messages


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str | None:
    try:
        return template.render(messages, tools=[FUNCTION], add_generation_prompt=add_generation_prompt)
    except TemplateStoppedError:
        raise
    except TorchchatError:
        return None


def _form_of(turn: str, answer: str) -> ToolForm | None:
    """Return the form that parses the call correctly.

    `turn` is the text after the question; `answer` starts at the end of the prompt for the question, or where the two
    texts first differ.
    """
    for form in FORMS:
        reader = ToolCallReader(form, {NAME: FUNCTION["function"]["parameters"]})  # type: ignore[index]
        reader.push(answer if form.bare else turn)
        if _same(reader.finish()[1]):
            return form
    return None


def _shared(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                min(len(first), len(second)))


def _same(calls: list[ToolCall]) -> bool:
    return [(call.name, json.loads(call.arguments)) for call in calls] == [(NAME, ARGUMENTS)]


def _hinted_form(source: str) -> ToolForm | None:
    """Return the form that a template mentions although it does not render calls."""
    if "tools" not in source:
        return None
    if "<function=" in source:
        return QWEN_XML if "<parameter=" in source else FUNCTION_JSON
    if "<|tool_call|>" in source:
        return GRANITE
    if "<tool_call>" in source:
        return HERMES
    if "[TOOL_CALLS]" in source or "[AVAILABLE_TOOLS]" in source:
        return MISTRAL
    return LLAMA3 if "<|start_header_id|>" in source and '"parameters"' in source else None
