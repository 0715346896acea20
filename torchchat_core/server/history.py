"""Define the messages and items of the conversation in a request.

Client libraries add their own fields to messages before they send them back, so undeclared fields are accepted. Fields
of a message are passed to the chat template if it mentions them (`torchchat_core.server.messages`); all others are
dropped. A field declared as `None` would change the conversation and is rejected with any other value; so is content
of an unknown type.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from torchchat_core.errors import quoted
from torchchat_core.server.body import MAX_ITEMS, Body, FunctionName, Text
from torchchat_core.tool_calls import parsed
from torchchat_core.tool_schemas import MAX_LEVELS


def _object_text(value: Any) -> Any:
    """Check that the arguments are a JSON object as a string. Null and white space mean "{}"."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "{}"
    if isinstance(value, str) and not isinstance(parsed(value), dict):
        raise ValueError(f"it is {quoted(value)}; expected a JSON object as a string, such as "
                         f'{{"city": "Rome"}}, of at most {MAX_LEVELS} levels')
    return value


ArgumentsText = Annotated[Text, BeforeValidator(_object_text)]
CallId = Annotated[str, Field(max_length=200)]


class Part(Body):
    """A part of a message or item. Fields that are not declared are dropped."""

    model_config = ConfigDict(extra="ignore")


class ChatMessage(Body):
    """A message. Fields that are not declared are kept for the chat template."""

    model_config = ConfigDict(extra="allow")


class TextPart(Part):
    type: Literal["text"]
    text: Text


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: Text


class FunctionCall(Part):
    name: FunctionName
    arguments: ArgumentsText = "{}"


class MessageToolCall(Part):
    id: CallId
    type: Literal["function"] | None = "function"
    function: FunctionCall


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class SystemMessage(ChatMessage):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(ChatMessage):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(ChatMessage):
    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart | RefusalPart],
                              Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = None
    refusal: Text | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=1024, fail_fast=True)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(ChatMessage):
    role: Literal["tool"]
    content: Content
    tool_call_id: CallId
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# ---- items of /v1/responses ----------------------------------------------------------------------------------------


class InputText(Part):
    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(Part):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class InputFunctionCall(Part):
    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: ArgumentsText = "{}"
    namespace: None = None


class InputFunctionOutput(Part):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Text | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


def _item_type(value: Any) -> Any:
    """Return the type of an item. The default is a message."""
    return value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputFunctionCall, Tag("function_call")]
    | Annotated[InputFunctionOutput, Tag("function_call_output")], Discriminator(_item_type)]
