"""The bodies of requests. What stands here is honoured; fields of type `None` alone are known and refused.

Other fields of a request are rejected as unknown; other fields of messages are accepted (`history`). Types and ranges
follow OpenAI's published API.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from torchchat_core.server.body import MAX_ITEMS, Body, FunctionName, JsonObject, Text
from torchchat_core.server.history import InputItem, Message

LARGEST_COUNT = 1 << 31
MOST_CHOICES = 128

MOST_BIASES = 1024
MOST_TOKENS = 1 << 20  # of a prompt


def _small(value: Any) -> Any:
    """Counted before any entry is looked at."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"it has {len(value)} entries; at most {MOST_BIASES} are possible")
    return value


Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
TokenText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None


class Sampling(Body):
    """How tokens are chosen: OpenAI's fields, and ours after them."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenText, Bias], BeforeValidator(_small)] | None = None
    seed: Seed | None = None
    stop: Stop = None
    top_k: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


# ---- tools and formats --------------------------------------------------------------------------------------------


class Function(Body):
    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class TextFormatChoice(Body):
    type: Literal["text"]


class JsonObjectChoice(Body):
    type: Literal["json_object"]


class SchemaDescription(Body):
    name: FunctionName
    description: Text | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaChoice(Body):
    type: Literal["json_schema"]
    json_schema: SchemaDescription


ResponseFormat = Annotated[TextFormatChoice | JsonObjectChoice | JsonSchemaChoice, Field(discriminator="type")]


# ---- requests -----------------------------------------------------------------------------------------------------


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[FunctionName, str | int | float | bool] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # every prompt is looked up in the cache, with or without a key
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


TokenPrompt = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Prompt = Text | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)] | TokenPrompt | Annotated[
    list[TokenPrompt], Field(min_length=1, max_length=2048, fail_fast=True)]


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    model: str
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: Literal[1] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    suffix: None = None


class EmbeddingRequest(Body):
    """POST /v1/embeddings"""

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None  # vectors of models that were not trained for it cannot be shortened
    user: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a conversation as the model reads it."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_TOKENS, fail_fast=True)]


# ---- responses ----------------------------------------------------------------------------------------------------


class ResponseTool(Body):
    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ResponseNamedTool(Body):
    type: Literal["function"]
    name: FunctionName


class ResponseJsonSchema(SchemaDescription):
    type: Literal["json_schema"]


ResponseFormatOfText = Annotated[TextFormatChoice | JsonObjectChoice | ResponseJsonSchema, Field(discriminator="type")]


class ResponseText(Body):
    format: ResponseFormatOfText | None = None
    verbosity: None = None


class ResponsesRequest(Body):
    """POST /v1/responses"""

    model: str
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    text: ResponseText | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None
    background: Literal[False] | None = None
    context_management: None = None
    conversation: None = None
    max_tool_calls: None = None
    metadata: None = None
    previous_response_id: None = None
    prompt: None = None
    prompt_cache_retention: None = None
    reasoning: None = None
    top_logprobs: None = None
