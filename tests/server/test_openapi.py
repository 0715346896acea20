"""The published OpenAPI document, and what schemathesis makes of it: right bodies and wrong ones; none gives a 500."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from torchchat_core.server.app import ENDPOINTS

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def published(chat_model: Path, start: Callable[..., Any]) -> Any:
    """The document of a server whose answers are short."""
    return schemathesis.openapi.from_url(f"{start(chat_model, '--max-output-tokens', 4)[1]}/openapi.json")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_bodies_made_from_the_document_never_fail_the_server(published: Any, path: str) -> None:
    operation, modes = published[path]["POST"], schemathesis.GenerationMode
    statuses = set()

    @given(st.one_of(operation.as_strategy(generation_mode=modes.POSITIVE),
                     operation.as_strategy(generation_mode=modes.NEGATIVE)))
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        found = case.call(timeout=30)
        statuses.add(found.status_code)
        assert found.status_code < 500, found.text
        if found.status_code != 200:
            assert found.json()["error"]["message"]

    ask()
    assert 400 in statuses


def test_what_is_read_is_in_the_document(published: Any) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        assert published[path]["GET"].Case().call().status_code == 200
