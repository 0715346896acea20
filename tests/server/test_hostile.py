"""What strangers send: odd values of every field, and bodies that are too large. Never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from torchchat_core.server.app import ENDPOINTS

MOST_TOKENS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 2}
ODD = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-10**400, 10**400), st.floats(),
                st.text(max_size=20), st.lists(st.integers(), max_size=3),
                st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))


def short(body: Any) -> Any:
    """The same request for few tokens: it is the checks that are asked here, and not the model's patience."""
    if not isinstance(body, dict):
        return body
    bounded = {name: min(body[name], most) if type(body.get(name)) is int else body[name]
               for name, most in MOST_TOKENS.items() if name in body}
    return {**body, "max_tokens": 4, **bounded} if "messages" in body or "prompt" in body else {**body, **bounded}


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
])
def test_odd_values_of_any_field_never_fail_the_server(client: TestClient, path: str, body: dict[str, Any]) -> None:
    fields = sorted(ENDPOINTS[path][0].model_fields)

    @given(name=st.sampled_from(fields), value=ODD)
    @settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def ask(name: str, value: Any) -> None:
        sent = json.dumps(short({"model": "tiny", **body, name: value}))
        found = client.post(path, content=sent, headers={"content-type": "application/json"})
        assert found.status_code in (200, 400, 404, 429), (name, value, found.text)

    ask()


def test_a_body_of_100_megabytes_is_refused_and_not_kept(client: TestClient) -> None:
    part = b" " * (1 << 20)

    def sent() -> Iterator[bytes]:
        for _ in range(100):
            yield part

    found = client.post("/v1/completions", content=sent(), headers={"content-type": "application/json"})
    assert found.status_code == 413
    assert "bytes" in found.json()["error"]["message"]
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_body_full_of_unknown_fields_is_refused_shortly(client: TestClient, path: str) -> None:
    body = json.dumps({"model": "tiny", **{f"field{index}": 1 for index in range(100_000)}})
    found = client.post(path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert len(found.text) < 1000
