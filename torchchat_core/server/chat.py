"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.responses import Response

from torchchat_core.batching import Job
from torchchat_core.constraints import check_grammar, constraint_for, schema_grammar
from torchchat_core.conversation import TRANSCRIPT_STOP, Message, render, with_stop
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.generation import Event, FinishedEvent, TextEvent, TokenEvent
from torchchat_core.generation_options import CallGrammar, GenerationOptions, Grammar
from torchchat_core.server.errors import ApiError, refused
from torchchat_core.server.exchange import (
    Exchange,
    chunks,
    json_response,
    json_text,
    logprob_entry,
    new_id,
    usage,
)
from torchchat_core.server.messages import template_messages
from torchchat_core.server.prompts import BoundedTokenizer
from torchchat_core.server.schemas import (
    ChatRequest,
    JsonObjectChoice,
    JsonSchemaChoice,
    NamedTool,
    TextFormatChoice,
)
from torchchat_core.specs import Tokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tool_calls import THINKING, ToolCall, ToolCallReader, ToolForm, opened_thinking, read_forced
from torchchat_core.tool_grammars import call_grammar
from torchchat_core.tool_profiles import ToolProfile, tool_profile
from torchchat_core.tool_schemas import forced_schema


@dataclass(frozen=True)
class ToolUse:
    """The functions that an answer may call, and how."""

    form: ToolForm
    profile: ToolProfile
    tools: tuple[dict[str, Any], ...]  # as the template gets them
    forced: bool  # the answer has to be a call
    several: bool  # more than one call is welcome
    strict: frozenset[str] = frozenset()  # names of functions whose schemas constrain the arguments
    thinking: str | None = None  # the tag at the end of the prompt that opens the model's thinking

    @property
    def functions(self) -> dict[str, dict[str, Any] | None]:
        """The functions' names and the schemas of their arguments."""
        return {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}


@dataclass(frozen=True)
class Plan:
    """What the model is given, and how its answers are to be made."""

    prompt: list[int]
    options: GenerationOptions
    tools: ToolUse | None


async def answer(exchange: Exchange, body: ChatRequest) -> Response:
    plan = await exchange.prepare(body.n or 1, make_plan, exchange, body)
    jobs = [Job(prompt=plan.prompt, options=plan.options, stream=index, client=exchange.client(body.user))
            for index in range(body.n or 1)]
    answers = exchange.submit(jobs, body.stream)
    tokenizer = exchange.engine.opened.text_format.tokenizer
    choices = [Choice(index, tokenizer, plan.tools, bool(body.logprobs)) for index in range(len(jobs))]
    head = {"id": new_id("chatcmpl-"), "created": exchange.created, "model": body.model,
            "system_fingerprint": exchange.service.fingerprint, "service_tier": "default"}
    if body.stream:
        head["object"] = "chat.completion.chunk"
        return exchange.stream(chunks(answers, choices, head, len(plan.prompt), body.stream_options))
    await exchange.collect(answers, choices)
    return json_response({**head, "object": "chat.completion", "choices": [choice.whole() for choice in choices],
                          "usage": usage(len(plan.prompt), [choice.end for choice in choices if choice.end], jobs)})


@dataclass
class Choice:
    """One of the answers, as it comes."""

    index: int
    tokenizer: Tokenizer
    tools: ToolUse | None
    with_logprobs: bool
    end: FinishedEvent | None = field(default=None, init=False)
    text: str = field(default="", init=False)
    calls: list[dict[str, Any]] = field(default_factory=list, init=False)
    logprobs: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._reader = ToolCallReader(self.tools.form, self.tools.functions, self.tools.thinking) \
            if self.tools and not self.tools.forced else None
        self._sent = 0  # characters of the text that `parts` gave
        self._logprobs_sent = 0
        self._told = False  # that it has ended

    def take(self, event: Event) -> None:
        if isinstance(event, TokenEvent) and self.with_logprobs:
            self.logprobs.append(logprob_entry(self.tokenizer, event))
        elif isinstance(event, TextEvent) and not (self.tools and self.tools.forced):
            self.text += self._reader.push(event.text) if self._reader else event.text
        elif isinstance(event, FinishedEvent):
            self.end = event
            self._finish(event)

    def _finish(self, event: FinishedEvent) -> None:
        calls: list[ToolCall] = []
        if self.tools and self.tools.forced:
            calls = read_forced(self.tools.form, event.text)
            self.text += "" if calls else event.text  # cut off by the limit
        elif self._reader and self.tools:
            rest, calls = self._reader.finish()
            self.text += rest
        if calls and self.tools and not self.tools.several:
            calls = calls[:1]
        if self.tools:
            self.calls = [{"id": self.tools.profile.new_id(), "type": "function",
                           "function": {"name": call.name, "arguments": call.arguments}} for call in calls]

    @property
    def reason(self) -> str | None:
        """Why it ended, where it has."""
        reason = self.end.reason if self.end else None
        return "tool_calls" if self.calls and reason == "stop" else reason

    def whole(self) -> dict[str, Any]:
        """As it stands in an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else ""),
                                   "refusal": None, "annotations": []}
        if self.calls:
            message["tool_calls"] = self.calls
        return {"index": self.index, "message": message, "finish_reason": self.reason,
                "logprobs": {"content": self.logprobs, "refusal": None} if self.with_logprobs else None}

    def opening(self) -> list[str]:
        return [self.part({"role": "assistant", "content": ""})]

    def parts(self) -> list[str]:
        found = []
        logprobs, self._logprobs_sent = self.logprobs[self._logprobs_sent :], len(self.logprobs)
        text, self._sent = self.text[self._sent :], len(self.text)
        if logprobs:
            found.append(self.part({"content": text}, logprobs))
        elif text:  # what nearly all chunks are, put together by hand
            found.append(f'{{"index":{self.index},"delta":{{"content":{json_text(text)}}},"finish_reason":null,'
                         '"logprobs":null}')
        if self.end and not self._told:
            self._told = True
            if self.calls:
                found.append(self.part({"tool_calls": [{"index": index, **call}
                                                       for index, call in enumerate(self.calls)]}))
            found.append(self.part({}, reason=self.reason))
        return found

    def part(self, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None, reason: str | None = None
             ) -> str:
        return json_text({"index": self.index, "delta": delta, "finish_reason": reason,
                          "logprobs": {"content": logprobs, "refusal": None} if logprobs else None})


# ---- from the request to the prompt -------------------------------------------------------------------------------


def make_plan(exchange: Exchange, body: ChatRequest) -> Plan:
    """Raises `ApiError` 400 for what the request may not ask of this model."""
    text_format = exchange.engine.opened.text_format
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is the old name of max_completion_tokens: give one of them", "max_tokens",
                       "invalid_value")
    tools = tool_use(body, text_format)
    if tools and not tools.forced and not isinstance(body.response_format, TextFormatChoice | None):
        raise ApiError(400, "an answer that has to be JSON cannot call tools: leave out response_format or tools, or "
                            "set tool_choice to \"none\"", "response_format", "invalid_value")
    messages = template_messages(body.messages, text_format.template)
    prompt, thinking = chat_prompt(exchange.text_format("messages"), messages, tools, body.chat_template_kwargs or {})
    tools = replace(tools, thinking=thinking) if tools else None
    exchange.check_prompt(prompt, "messages")
    options = exchange.options(
        body, body.max_completion_tokens or body.max_tokens, grammar=_grammar(body, tools, text_format),
        calls=_call_grammar(tools, text_format) if tools else None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        shown=tools.form.marks(text_format.tokenizer) if tools else frozenset(),
        param="max_tokens" if body.max_tokens else "max_completion_tokens")
    return Plan(prompt, options if text_format.template else with_stop(options, TRANSCRIPT_STOP), tools)


def chat_prompt(text_format: TextFormat, messages: Sequence[Message], tools: ToolUse | None,
                variables: Mapping[str, Any]) -> tuple[list[int], str | None]:
    """Return the token ids of the prompt, and the tag at its end that opens the model's thinking, if there is one.

    Raises `ApiError` 400 for messages that the model's template rejects.
    """
    if text_format.template is None and variables:
        raise ApiError(400, "the model has no chat template that could read them", "chat_template_kwargs",
                       "unsupported_parameter")
    reserved = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"} & variables.keys()
    if reserved:
        raise ApiError(400, f"the variable {quoted(min(reserved))} is reserved", "chat_template_kwargs")
    if text_format.template is None and any(message["role"] == "tool" for message in messages):
        raise ApiError(400, "the model has no chat template, and so knows no tools", "messages")
    try:
        text, encode = render(text_format, messages, list(tools.tools) if tools else None, variables)
        thinking = opened_thinking(text)
        if tools and tools.forced:  # the call is the answer itself
            text += (f"\n{THINKING[thinking]}\n\n" if thinking else "") + tools.form.opening
        if isinstance(text_format.tokenizer, BoundedTokenizer):
            text_format.tokenizer.check_size(text)  # before `encode` scans it for control tokens
        return encode(text), thinking
    except TorchchatError as error:
        raise refused(error, "messages") from None


def tool_use(body: ChatRequest, text_format: TextFormat) -> ToolUse | None:
    """Raises `ApiError` 400 where the model knows no tools, or `tool_choice` names none of them."""
    choice = body.tool_choice or "auto"
    if not body.tools:
        if choice not in ("auto", "none"):
            raise ApiError(400, "tool_choice needs tools", "tool_choice", "invalid_value")
        return None
    if choice == "none":
        return None
    profile = tool_profile(text_format.template)
    form = profile.form
    if form is None:
        raise ApiError(400, "the model's chat template knows no tools in a form that is known here", "tools",
                       "unsupported_parameter")
    tools = tuple(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools)
    if isinstance(choice, NamedTool):
        named = tuple(tool for tool in tools if tool["function"]["name"] == choice.function.name)
        if not named:
            raise ApiError(400, f"tool_choice names {quoted(choice.function.name)}, which is not one of the tools",
                           "tool_choice", "invalid_value")
        tools = named
    return ToolUse(form, profile, tools, forced=choice != "auto", several=body.parallel_tool_calls is not False,
                   strict=frozenset(tool.function.name for tool in body.tools if tool.function.strict))


def _grammar(body: ChatRequest, tools: ToolUse | None, text_format: TextFormat) -> Grammar | None:
    """What the answer has to be like. Raises `ApiError` 400 for a schema that cannot be enforced."""
    if tools and tools.forced:
        return checked_grammar(forced_schema(tools.form.arguments, tools.functions), text_format, "tools")
    if isinstance(body.response_format, JsonObjectChoice):
        return checked_grammar({"type": "object"}, text_format, "response_format")
    if isinstance(body.response_format, JsonSchemaChoice):
        return checked_grammar(body.response_format.json_schema.schema_, text_format, "response_format")
    return None


def _call_grammar(tools: ToolUse, text_format: TextFormat) -> CallGrammar | None:
    """Return the grammar for optional calls if any function is strict, else None."""
    if tools.forced or not tools.strict:
        return None
    functions = {name: schema if name in tools.strict else None for name, schema in tools.functions.items()}
    try:
        for schema in functions.values():
            if schema is not None:
                schema_grammar(schema)  # gives clearer errors than the grammar of all calls
        calls = call_grammar(tools.form, functions, text_format.tokenizer)
        check_grammar(calls.grammar)
        constraint_for(calls.grammar, text_format)
        return replace(calls, thinking=tools.thinking)
    except TorchchatError as error:
        raise ApiError(400, str(error), "tools", "invalid_value") from None


def checked_grammar(schema: dict[str, Any], text_format: TextFormat, param: str) -> Grammar:
    """It is compiled here, where the model does not wait for it."""
    try:
        grammar = schema_grammar(schema)
        constraint_for(grammar, text_format)
        return grammar
    except TorchchatError as error:
        raise ApiError(400, str(error), param, "invalid_value") from None
