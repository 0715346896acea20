"""Run a tool loop with openai-agents: ADDRESS MODEL chat|responses."""

from __future__ import annotations

import asyncio
import json
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI


@function_tool
def get_time(zone: str) -> str:
    """Return the time in a zone."""
    assert zone == "x", zone
    return "12:00 by the clock"


async def main(address: str, model: str, api: str) -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=address, api_key="none", max_retries=0)
    kind = OpenAIResponsesModel if api == "responses" else OpenAIChatCompletionsModel
    agent = Agent(name="clock", instructions="Use the tool.", tools=[get_time],
                  model=kind(model=model, openai_client=client), model_settings=ModelSettings(temperature=0))
    first = await Runner.run(agent, "time?")
    streamed = Runner.run_streamed(agent, [*first.to_input_list(), {"role": "user", "content": "and now?"}])
    async for _ in streamed.stream_events():
        pass
    fresh = Runner.run_streamed(agent, "time?")
    async for _ in fresh.stream_events():
        pass
    print(json.dumps([first.final_output, streamed.final_output, fresh.final_output]))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
