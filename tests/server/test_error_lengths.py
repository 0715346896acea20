"""Errors of the server quote values of the request, and stay short."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

HUGE = "ab" * 60_000
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize("changes", [
    {HUGE: 1}, {"model": HUGE}, {"temperature": HUGE}, {"messages": HUGE},
    {"messages": [{"role": HUGE, "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": HUGE}]}]}, {"messages": [{"role": "user", HUGE: 1}]},
    {"response_format": {"type": HUGE}}, {"tool_choice": HUGE}, {"tool_choice": {"type": "function", "function":
                                                                                {"name": HUGE}}},
    {"logit_bias": {HUGE: 1}}, {"stop": [HUGE] * 9}, {"tools": [{"type": HUGE}]}, {"chat_template_kwargs": {HUGE: 1}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": HUGE}}}},
], ids=lambda changes: str(changes)[:40])
def test_errors_about_requests_are_short(changes: dict[str, Any], client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={**ASKED, "max_tokens": 1, **changes})
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert len(error["message"]) < 1000
        assert len(error["param"] or "") < 1000


@pytest.mark.parametrize("changes", [
    {"logit_bias": {HUGE: 1}}, {"messages": [{"role": HUGE, "content": "a"}]}, {HUGE: 1},
    {"response_format": {"type": HUGE}}, {"chat_template_kwargs": {HUGE: 1}},
], ids=["logit_bias", "role", "field", "response_format", "chat_template_kwargs"])
def test_errors_quote_at_most_60_characters_of_a_value(changes: dict[str, Any], client: TestClient) -> None:
    error = client.post("/v1/chat/completions", json={**ASKED, **changes}).json()["error"]
    for text in (error["message"], error["param"]):
        assert HUGE[:61] not in text
    assert HUGE[:40] in error["message"]


def test_the_type_of_an_unknown_item_is_quoted(client: TestClient) -> None:
    found = client.post("/v1/responses", json={"model": "tiny", "input": [{"type": HUGE}]})
    message = found.json()["error"]["message"]
    assert message.startswith("input[0]: type is 'abab")
    assert HUGE[:61] not in message


@pytest.mark.parametrize("path", ["/v1/" + HUGE[:60_000], "/v1/models/" + HUGE[:60_000]])
def test_errors_about_addresses_are_short(path: str, client: TestClient) -> None:
    assert len(client.get(path).text) < 1500
