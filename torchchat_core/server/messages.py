"""Convert the messages of a request to those that a chat template receives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.conversation import Message
from torchchat_core.server.errors import ApiError
from torchchat_core.server.history import (
    AssistantMessage,
    MessageToolCall,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from torchchat_core.tool_profiles import ToolProfile, tool_profile

ChatMessages = Sequence[SystemMessage | UserMessage | AssistantMessage | ToolMessage]
DECLARED = frozenset(name for kind in (SystemMessage, UserMessage, AssistantMessage, ToolMessage)
                     for name in kind.model_fields)
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that servers use for a model's reasoning


def template_messages(messages: ChatMessages, template: ChatTemplate | None) -> list[Message]:
    """Return the messages in the form that `template` expects.

    Content becomes text. Arguments of calls become objects, or strings if the template concatenates them. Call ids get
    the form that the template requires. Raises `ApiError` 400 for an empty assistant message.
    """
    profile = tool_profile(template)
    names = template.names if template is not None else frozenset[str]()
    return [_template_message(message, profile, names) for message in messages]


def _template_message(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage, profile: ToolProfile,
                      names: frozenset[str]) -> Message:
    extra = message.model_extra or {}
    found: Message = {"role": "system" if message.role == "developer" else message.role,
                      "content": _text(message.content), **_read_fields(extra, names)}
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = profile.template_id(message.tool_call_id)
    if isinstance(message, AssistantMessage):
        found["content"] = found["content"] or message.refusal or ""
        if message.tool_calls:
            found["tool_calls"] = [_template_call(call, profile) for call in message.tool_calls]
            found["content"] = found["content"] or (None if profile.null_content else "")
        elif message.content is None and message.refusal is None and not any(map(extra.get, REASONING)):
            raise ApiError(400, "an assistant message has neither content nor tool_calls", "messages")
    return found


def _template_call(call: MessageToolCall, profile: ToolProfile) -> Message:
    arguments = call.function.arguments
    return {"id": profile.template_id(call.id), "type": "function", "function": {
        "name": call.function.name, "arguments": arguments if profile.text_arguments else json.loads(arguments)}}


def _read_fields(extra: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return the extra fields that the template mentions. Reasoning is passed under the template's name for it."""
    found = {name: value for name, value in extra.items()
             if name in names and name not in DECLARED and value is not None}
    reasoning = next((extra[name] for name in REASONING if isinstance(extra.get(name), str)), None)
    if reasoning is not None and not any(name in found for name in REASONING):
        found |= {name: reasoning for name in REASONING if name in names}
    return found


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
    return str(content) if content is not None else ""
