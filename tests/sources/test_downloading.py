"""Where redirects may lead, and how long a busy server is waited for."""

from __future__ import annotations

import io
import time
from email.message import Message
from email.utils import formatdate
from urllib.request import Request

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.sources import downloading
from torchchat_core.sources.downloading import ConnectionFailure, HTTPFailure, seconds_to_wait, trying_again


def redirected(url: str, target: str) -> Request | None:
    request = Request(url, headers={"Authorization": "Bearer secret", "Range": "bytes=5-"})
    return downloading._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", Message(), target)


def test_a_redirect_to_another_host_loses_the_token_and_keeps_the_range() -> None:
    there = redirected("https://hub.example/a", "https://cdn.example/b")
    assert there is not None
    assert dict(there.header_items()) == {"Range": "bytes=5-"}
    same = redirected("https://hub.example/a", "https://hub.example/b")
    assert same is not None
    assert same.get_header("Authorization") == "Bearer secret"


@pytest.mark.parametrize("target", ["http://cdn.example/b", "http://127.0.0.1/b", "https://localhost/b",
                                    "https://[::1]/b", "ftp://cdn.example/b"])
def test_a_server_elsewhere_redirects_to_https_elsewhere_alone(target: str) -> None:
    with pytest.raises(TorchchatError):
        redirected("https://hub.example/a", target)


def test_a_users_own_hub_may_be_without_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TorchchatError):
        downloading.check_encrypted("http://mirror.lan:8080/a/b")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.lan:8080")
    downloading.check_encrypted("http://mirror.lan:8080/a/b")
    with pytest.raises(TorchchatError):
        downloading.check_encrypted("http://mirror.lan:80801/a/b")


@pytest.mark.parametrize(("headers", "seconds"), [
    ({}, None), ({"retry-after": "7"}, 7.0), ({"retry-after": "soon"}, None),
    ({"ratelimit": '"api";r=0;t=55'}, 55.0), ({"ratelimit": '"api";r=10;t=55', "retry-after": "3"}, 3.0)])
def test_a_server_says_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert seconds_to_wait(headers) == seconds


def test_a_server_may_name_a_time_to_wait_for() -> None:
    waited = seconds_to_wait({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert waited is not None
    assert 90 < waited < 110


@pytest.mark.parametrize(("failure", "attempts"), [
    (ConnectionFailure("gone"), downloading.FIRST_ATTEMPTS), (HTTPFailure(503, {}, ""), downloading.ATTEMPTS),
    (HTTPFailure(404, {}, ""), 1), (HTTPFailure(429, {"Retry-After": "61"}, ""), 1)])
def test_only_what_may_pass_is_tried_again(failure: Exception, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise failure

    with pytest.raises(type(failure)):
        trying_again(fail)
    assert len(calls) == attempts
