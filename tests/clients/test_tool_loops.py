"""Client libraries complete their tool loops, and the histories that they send back are accepted.

The libraries' versions conflict with constraints.txt, so they live in environments of their own: `make setup-clients`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

FAMILIES = ["qwen", "llama", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["create", "stream", "parse", "deltas", "responses", "responses-stream"])
@pytest.mark.parametrize("environment", ["agents", "openai2"])
def test_openai_completes_a_tool_loop(environment: str, how: str, family: str, drive: Callable[..., str]) -> None:
    assert json.loads(drive(environment, "openai_client", family, how)) == ["Noon."] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("driver", ["agents_client", "pydantic_ai_client", "langchain_client", "litellm_client"])
def test_an_agent_library_completes_a_tool_loop(driver: str, api: str, family: str, drive: Callable[..., str]) -> None:
    answers = json.loads(drive("agents", driver, family, api))
    assert set(answers) == {"Noon."}, answers
