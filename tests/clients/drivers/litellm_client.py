"""Run a tool loop with litellm: ADDRESS MODEL chat|responses."""

from __future__ import annotations

import json
import sys

import litellm

TOOL = {"name": "get_time", "description": "Return the time in a zone.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}


def chat(address: str, model: str, streamed: bool) -> list[str]:
    messages: list = [{"role": "user", "content": "time?"}]
    answers = []
    for _ in range(2):
        while True:
            found = litellm.completion(model=f"openai/{model}", api_base=address, api_key="none", messages=messages,
                                       tools=[{"type": "function", "function": TOOL}], temperature=0, stream=streamed)
            if streamed:
                found = litellm.stream_chunk_builder(list(found), messages=messages)
            message = found.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                assert json.loads(call.function.arguments) == {"zone": "x"}, call
                messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name,
                                 "content": "12:00 by the clock"})
        answers.append(message.content)
        messages.append({"role": "user", "content": "and now?"})
    return answers


def responses(address: str, model: str) -> list[str]:
    history: list = [{"role": "user", "content": "time?"}]
    answers = []
    for _ in range(2):
        while True:
            found = litellm.responses(model=f"openai/{model}", api_base=address, api_key="none", input=history,
                                      tools=[{"type": "function", **TOOL}], temperature=0)
            history += [item if isinstance(item, dict) else item.model_dump() for item in found.output]
            calls = [item for item in history[-len(found.output):] if item["type"] == "function_call"]
            if not calls:
                break
            for call in calls:
                assert json.loads(call["arguments"]) == {"zone": "x"}, call
                history.append({"type": "function_call_output", "call_id": call["call_id"],
                                "output": "12:00 by the clock"})
        answers.append(history[-1]["content"][0]["text"])
        history.append({"role": "user", "content": "and now?"})
    return answers


if __name__ == "__main__":
    address, model, api = sys.argv[1:]
    print(json.dumps(responses(address, model) if api == "responses"
                     else chat(address, model, False) + chat(address, model, True)))
