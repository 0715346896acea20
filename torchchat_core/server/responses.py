"""POST /v1/responses: the same answers as chat completions, in the form of OpenAI's newer interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from torchchat_core.batching import Job
from torchchat_core.server.chat import Choice, make_plan
from torchchat_core.server.engine import Answers
from torchchat_core.server.errors import ApiError
from torchchat_core.server.exchange import Exchange, generated_tokens, json_response, json_text, new_id
from torchchat_core.server.history import (
    AssistantMessage,
    FunctionCall,
    InputFunctionCall,
    InputFunctionOutput,
    InputMessage,
    InputText,
    MessageToolCall,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from torchchat_core.server.schemas import (
    ChatRequest,
    Function,
    JsonSchemaChoice,
    NamedFunction,
    NamedTool,
    ResponseJsonSchema,
    ResponseNamedTool,
    ResponsesRequest,
    SchemaDescription,
    Tool,
)

Messages = list[SystemMessage | UserMessage | AssistantMessage | ToolMessage]


async def answer(exchange: Exchange, body: ResponsesRequest) -> Response:
    request = as_chat(body)
    plan = await exchange.prepare(1, _renamed, exchange, request)
    job = Job(prompt=plan.prompt, options=plan.options, client=exchange.client(body.user))
    answers = exchange.submit([job], body.stream)
    choice = Choice(0, exchange.engine.opened.text_format.tokenizer, plan.tools, with_logprobs=False)
    written = Written(exchange, body, choice, job)
    if body.stream:
        return exchange.stream(_events(answers, written))
    await exchange.collect(answers, [choice])
    return json_response(written.response())


def _renamed(exchange: Exchange, request: ChatRequest) -> Any:
    """The plan; errors name the fields of this interface."""
    try:
        return make_plan(exchange, request)
    except ApiError as error:
        names = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
        raise ApiError(error.status, error.message, names.get(error.param or "", error.param), error.code) from None


class Written:
    """A response as it is being written."""

    def __init__(self, exchange: Exchange, body: ResponsesRequest, choice: Choice, job: Job) -> None:
        self.choice = choice
        self.message_id = new_id("msg_")
        self._job = job
        self._call_ids: list[str] = []
        self._head = {
            "id": new_id("resp_"), "object": "response", "created_at": exchange.created, "model": body.model,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "store": False,
            "temperature": job.options.sampling.temperature, "top_p": job.options.sampling.top_p,
            "text": body.text.model_dump(exclude_none=True, by_alias=True) if body.text and body.text.format
            else {"format": {"type": "text"}},
            "tool_choice": body.tool_choice.model_dump() if isinstance(body.tool_choice, ResponseNamedTool)
            else body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "truncation": "disabled", "user": body.user, "service_tier": "default", "background": False}

    def response(self) -> dict[str, Any]:
        """The whole object, as far as it is."""
        end = self.choice.end
        if end is None:
            return {**self._head, "status": "in_progress", "output": [], "usage": None, "error": None,
                    "incomplete_details": None}
        cut = end.reason == "length"
        prompt, new = len(self._job.prompt), generated_tokens(end)
        return {**self._head, "status": "incomplete" if cut else "completed", "error": None,
                "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "output": self.output(),
                "usage": {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": self._job.reused},
                          "output_tokens": new, "output_tokens_details": {"reasoning_tokens": 0},
                          "total_tokens": prompt + new}}

    def output(self) -> list[dict[str, Any]]:
        """The message, where it says anything or nothing else is there, and the calls."""
        found = [self.message("incomplete" if self.choice.reason == "length" else "completed")] \
            if self.choice.text or not self.choice.calls else []
        while len(self._call_ids) < len(self.choice.calls):
            self._call_ids.append(new_id("fc_"))
        return [*found, *({"type": "function_call", "id": own, "call_id": call["id"], "status": "completed",
                           **call["function"]} for own, call in zip(self._call_ids, self.choice.calls, strict=True))]

    def message(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part(self.choice.text)]
        return {"type": "message", "id": self.message_id, "status": status, "role": "assistant", "content": content}

    @staticmethod
    def part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _events(answers: Answers, written: Written) -> AsyncIterator[str]:
    number = -1

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return f"event: {kind}\ndata: {json_text({'type': kind, 'sequence_number': number, **fields})}\n\n"

    choice = written.choice
    yield event("response.created", response=written.response())
    yield event("response.in_progress", response=written.response())
    place = {"item_id": written.message_id, "output_index": 0, "content_index": 0}
    sent, opened = 0, False
    try:
        while events := await answers.read():
            for _, each in events:
                choice.take(each)
            if not opened and (choice.text or (choice.end and not choice.calls)):
                opened = True
                yield event("response.output_item.added", output_index=0, item=written.message("in_progress"))
                yield event("response.content_part.added", **place, part=written.part(""))
            if len(choice.text) > sent:
                yield event("response.output_text.delta", **place, delta=choice.text[sent:], logprobs=[])
                sent = len(choice.text)
    except ApiError as error:
        yield event("error", code=error.code, message=error.message, param=error.param)
        return
    if opened:
        yield event("response.output_text.done", **place, text=choice.text, logprobs=[])
        yield event("response.content_part.done", **place, part=written.part(choice.text))
    for index, item in enumerate(written.output()):
        if item["type"] == "function_call":
            yield event("response.output_item.added", output_index=index,
                        item={**item, "arguments": "", "status": "in_progress"})
            yield event("response.function_call_arguments.delta", item_id=item["id"], output_index=index,
                        delta=item["arguments"])
            yield event("response.function_call_arguments.done", item_id=item["id"], output_index=index,
                        name=item["name"], arguments=item["arguments"])
        yield event("response.output_item.done", output_index=index, item=item)
    done = written.response()
    yield event("response.incomplete" if done["status"] == "incomplete" else "response.completed", response=done)


# ---- from this interface's request to that of chat completions ----------------------------------------------------


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The request in the terms of chat completions."""
    form = body.text.format if body.text else None
    if isinstance(form, ResponseJsonSchema):
        described = SchemaDescription.model_construct(name=form.name, schema_=form.schema_, strict=form.strict)
        form_choice: Any = JsonSchemaChoice.model_construct(type="json_schema", json_schema=described)
    else:
        form_choice = form
    choice: Any = body.tool_choice
    if isinstance(choice, ResponseNamedTool):
        choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
    tools = [Tool(type="function", function=Function(name=tool.name, description=tool.description,
                                                     parameters=tool.parameters, strict=tool.strict))
             for tool in body.tools or []]
    return ChatRequest.model_construct(
        model=body.model, messages=_messages(body), temperature=body.temperature, top_p=body.top_p,
        max_completion_tokens=body.max_output_tokens, response_format=form_choice, tools=tools or None,
        tool_choice=choice, parallel_tool_calls=body.parallel_tool_calls)


def _messages(body: ResponsesRequest) -> Messages:
    found: Messages = []
    if body.instructions is not None:
        found.append(SystemMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*found, UserMessage(role="user", content=body.input)]
    for item in body.input:
        _add(found, item)
    return found


def _add(messages: Messages, item: InputMessage | InputFunctionCall | InputFunctionOutput) -> None:
    """Add an item to the messages. The assistant's text and the calls after it become one message."""
    if isinstance(item, InputFunctionOutput):
        messages.append(ToolMessage(role="tool", tool_call_id=item.call_id, content=_content(item.output)))
    elif isinstance(item, InputFunctionCall):
        call = MessageToolCall(id=item.call_id, type="function",
                               function=FunctionCall(name=item.name, arguments=item.arguments))
        last = messages[-1] if messages else None
        if isinstance(last, AssistantMessage):
            last.tool_calls = [*(last.tool_calls or []), call]
        else:
            messages.append(AssistantMessage(role="assistant", tool_calls=[call]))
    elif item.role == "user":
        messages.append(UserMessage(role="user", content=_content(item.content)))
    elif item.role == "assistant":
        messages.append(AssistantMessage(role="assistant", content=_text_of(item.content)))
    else:
        messages.append(SystemMessage(role="system", content=_content(item.content)))


def _content(content: str | Sequence[InputText]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def _text_of(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
