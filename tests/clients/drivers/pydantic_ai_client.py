"""Run a tool loop with pydantic-ai: ADDRESS MODEL chat|responses."""

from __future__ import annotations

import asyncio
import json
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


async def main(address: str, model: str, api: str) -> None:
    kind = OpenAIResponsesModel if api == "responses" else OpenAIChatModel
    agent = Agent(kind(model, provider=OpenAIProvider(base_url=address, api_key="none")), instructions="Use the tool.",
                  model_settings={"temperature": 0})

    @agent.tool_plain
    def get_time(zone: str) -> str:
        """Return the time in a zone."""
        assert zone == "x", zone
        return "12:00 by the clock"

    first = await agent.run("time?")
    second = await agent.run("and now?", message_history=first.all_messages())
    async with agent.run_stream("time?") as found:
        streamed = await found.get_output()
    print(json.dumps([first.output, second.output, streamed]))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
