"""Run a tool loop with langchain-openai: ADDRESS MODEL chat|responses."""

from __future__ import annotations

import json
import sys

from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_time(zone: str) -> str:
    """Return the time in a zone."""
    assert zone == "x", zone
    return "12:00 by the clock"


def main(address: str, model: str, api: str) -> None:
    chat = ChatOpenAI(base_url=address, api_key="none", model=model, temperature=0, max_retries=0,
                      use_responses_api=api == "responses")
    answers = []
    for strict, streamed in ((None, False), (True, False), (None, True)):
        bound = chat.bind_tools([get_time], strict=strict)
        messages: list[AnyMessage] = [HumanMessage("time?")]
        for question in (None, "and now?"):
            if question is not None:
                messages.append(HumanMessage(question))
            while True:
                if streamed:
                    message = None
                    for chunk in bound.stream(messages):
                        message = chunk if message is None else message + chunk
                else:
                    message = bound.invoke(messages)
                messages.append(message)
                if not message.tool_calls:
                    break
                messages += [get_time.invoke(call) for call in message.tool_calls]
            answers.append(message.text if isinstance(message.text, str) else message.text())
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
