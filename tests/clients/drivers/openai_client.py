"""Run a tool loop with the official client: ADDRESS MODEL create|stream|parse|deltas|responses|responses-stream."""

from __future__ import annotations

import json
import sys

import openai
from openai import OpenAI
from pydantic import BaseModel


class Zone(BaseModel):
    """Return the time in a zone."""

    zone: str


def chat(client: OpenAI, model: str, how: str) -> list[str]:
    tools = [openai.pydantic_function_tool(Zone, name="get_time")]
    messages: list = [{"role": "user", "content": "time?"}]
    answers = []
    for _ in range(2):
        while True:
            if how == "stream":
                with client.chat.completions.stream(model=model, messages=messages, tools=tools,
                                                    temperature=0) as events:
                    for _event in events:
                        pass
                    message = events.get_final_completion().choices[0].message
            elif how == "parse":
                message = client.chat.completions.parse(model=model, messages=messages, tools=tools,
                                                        temperature=0).choices[0].message
            elif how == "deltas":
                message = added_up(client.chat.completions.create(model=model, messages=messages, tools=tools,
                                                                  temperature=0, stream=True))
            else:
                message = client.chat.completions.create(model=model, messages=messages, tools=tools,
                                                         temperature=0).choices[0].message
            messages.append(message)
            calls = message["tool_calls"] if isinstance(message, dict) else [
                call.model_dump() for call in message.tool_calls or []]
            if not calls:
                break
            for call in calls:
                assert json.loads(call["function"]["arguments"]) == {"zone": "x"}, call
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": "12:00 by the clock"})
        answers.append(message["content"] if isinstance(message, dict) else message.content)
        messages.append({"role": "user", "content": "and now?"})
    return answers


def added_up(stream) -> dict:
    """Add up the deltas as OpenAI's guide to streamed function calls does."""
    content, calls = "", {}
    for chunk in stream:
        if not chunk.choices:
            continue
        content += chunk.choices[0].delta.content or ""
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.index not in calls:
                calls[call.index] = call
            else:
                calls[call.index].function.arguments += call.function.arguments
    found = {"role": "assistant", "content": content, "tool_calls": [call.model_dump() for call in calls.values()]}
    return found if calls else {**found, "tool_calls": None}


def responses(client: OpenAI, model: str, streamed: bool) -> list[str]:
    tools = [{"type": "function", "name": "get_time", "description": "Return the time in a zone.", "strict": True,
              "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"],
                             "additionalProperties": False}}]
    history: list = [{"role": "user", "content": "time?"}]
    answers = []
    for _ in range(2):
        while True:
            if streamed:
                with client.responses.stream(model=model, input=history, tools=tools, temperature=0) as events:
                    for _event in events:
                        pass
                    found = events.get_final_response()
            else:
                found = client.responses.create(model=model, input=history, tools=tools, temperature=0)
            history += found.output
            calls = [item for item in found.output if item.type == "function_call"]
            if not calls:
                break
            for call in calls:
                assert json.loads(call.arguments) == {"zone": "x"}, call
                history.append({"type": "function_call_output", "call_id": call.call_id,
                                "output": "12:00 by the clock"})
        answers.append(found.output_text)
        history.append({"role": "user", "content": "and now?"})
    return answers


if __name__ == "__main__":
    address, model, how = sys.argv[1:]
    client = OpenAI(base_url=address, api_key="none", max_retries=0)
    if how.startswith("responses"):
        print(json.dumps(responses(client, model, how.endswith("stream"))))
    else:
        print(json.dumps(chat(client, model, how)))
