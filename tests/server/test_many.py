"""Many requests at once: the same answers, places that become free, several models."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from torchchat_core import batching
from torchchat_core.batching import Batch, Failure, Job
from torchchat_core.generation import FinishedEvent, TextEvent, TokenEvent, TokenSequence
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry

GREEDY = SamplingOptions(temperature=0.0)


def complete(client: TestClient, prompt: str, tokens: int = 24, **fields: Any) -> str:
    found = client.post("/v1/completions", json={"model": "stories", "prompt": prompt, "max_tokens": tokens,
                                                 "temperature": 0, **fields})
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def test_64_clients_get_what_each_gets_alone(stories: TestClient) -> None:
    prompts = [f"{start} {number}" for number in range(16) for start in ("Once", "Tom and", "The cat", "Mom said")]
    alone = [complete(stories, prompt) for prompt in prompts]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda prompt: complete(stories, prompt), prompts))
    assert together == alone
    assert len(set(alone)) > 32


def batch_of(opened: Any, width: int = 8, kept_tokens: int = 1000, **abilities: Any) -> Batch:
    return Batch(opened.model, opened.text_format, opened.executor, limit=256, width=width, kept_tokens=kept_tokens)


def finish(batch: Batch, jobs: list[Job]) -> dict[int, Any]:
    """The last event of each of the jobs, by its place."""
    for job in jobs:
        batch.add(job)
    ends: dict[int, Any] = {}
    while batch.active or batch.waiting:
        for job, event in batch.step():
            if isinstance(event, FinishedEvent | Failure):
                ends[jobs.index(job)] = event
    return ends


def job(prompt: list[int], tokens: int = 8, **fields: Any) -> Job:
    return Job(prompt=prompt, options=GenerationOptions(sampling=GREEDY, max_new_tokens=tokens), **fields)


@pytest.fixture(scope="module")
def opened(testdata: Path) -> Any:
    with open_model(ModelRequest(model=str(testdata / "hf" / "stories260K")), load_registry()) as found:
        yield found


def test_a_batch_is_computed_in_one_step_for_all(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened)
    ends = finish(batch, [job([1, 5 + index]) for index in range(8)])
    assert all(end.reason == "length" for end in ends.values())
    assert batch.steps == 7  # the first tokens come from the prompts
    assert batch.decoded == 56


@pytest.mark.parametrize("fields", [{}, {"stop": ("park", "zzz")}, {"logprobs": 2}, {"stop": ("and",), "logprobs": 0}],
                         ids=str)
def test_an_answer_of_which_less_is_told_is_the_same(fields: dict[str, Any], opened: Any, one_thread: None
                                                               ) -> None:
    options = GenerationOptions(sampling=GREEDY, max_new_tokens=40, **fields)
    prompts = [[1, 403, 407 + index] for index in range(4)]
    found = []
    for told in ("tokens", "text", "end"):
        batch = batch_of(opened)
        jobs = [Job(prompt=prompt, options=options, told=told) for prompt in prompts]
        for each in jobs:
            batch.add(each)
        events: list[list[Any]] = [[] for _ in jobs]
        while batch.active or batch.waiting:
            for each, event in batch.step():
                events[jobs.index(each)].append(event)
        found.append(events)
    for of_tokens, of_text, whole in zip(*found, strict=True):
        tokens = [event for event in of_tokens if isinstance(event, TokenEvent)]
        texts = [event for event in of_tokens if isinstance(event, TextEvent)]
        end = of_tokens[-1]
        assert tuple(event.token for event in tokens) == end.token_ids
        assert "".join(event.text for event in texts) == end.text
        assert len(texts) > 1
        for events, expected in ((of_text, texts), (whole, [TextEvent(text=end.text)])):
            told_tokens = [event for event in events if isinstance(event, TokenEvent)]
            assert told_tokens == (tokens if "logprobs" in fields else [])
            assert [event for event in events if isinstance(event, TextEvent)] == expected
            assert (events[-1].text, events[-1].token_ids, events[-1].reason) == (end.text, end.token_ids, end.reason)
    assert len({events[-1].text for events in found[0]}) > 1


def test_without_the_ability_answers_take_turns(opened: Any, one_thread: None) -> None:
    import dataclasses

    alone = dataclasses.replace(opened.executor, abilities=frozenset())
    batch = Batch(opened.model, opened.text_format, alone, limit=256, width=4, kept_tokens=0)
    together = batch_of(opened)
    prompts = [[1, 5 + index] for index in range(6)]
    first, second = finish(batch, [job(p) for p in prompts]), finish(together, [job(p) for p in prompts])
    assert [first[i].token_ids for i in range(6)] == [second[i].token_ids for i in range(6)]


def test_a_client_with_few_answers_goes_before_one_with_many(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened, width=2)
    jobs = [job([1, 5], client="many") for _ in range(6)] + [job([1, 6], client="few")]
    order = []
    for each in jobs:
        batch.add(each)
    while batch.active or batch.waiting:
        order += [each.client for each, event in batch.step() if isinstance(event, FinishedEvent)]
    assert "few" in order[:3]


def test_prompts_that_begin_alike_are_computed_once(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened)
    shared = [1, *range(10, 60)]
    jobs = [job([*shared, 100 + index]) for index in range(4)]
    ends = finish(batch, jobs)
    assert [each.reused for each in jobs] == [0, 51, 51, 51]
    fresh = [finish(batch_of(opened), [job([*shared, 100 + index])])[0] for index in range(4)]
    assert [ends[i].token_ids for i in range(4)] == [end.token_ids for end in fresh]


def test_idle_sequences_keep_no_more_tokens_than_permitted(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened, kept_tokens=600)
    for index in range(10):
        finish(batch, [job([1, *range(20 * index, 20 * index + 40)], tokens=2)])
    assert batch.pool.held_tokens == 512  # each has memory for 256, however short it is


def test_short_prompts_are_computed_in_one_call(opened: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, prefill_together = [], batching.prefill_together

    def counting(model: Any, sequences: Any, prompts: Any) -> Any:
        calls.append(list(map(len, prompts)))
        return prefill_together(model, sequences, prompts)

    monkeypatch.setattr(batching, "prefill_together", counting)
    prompts = [[1, 5, 6], [1, 7], [1, *range(20, 60)], [1, 8, 9, 10]]
    together = finish(batch_of(opened), [job(prompt) for prompt in prompts])
    assert calls == [[3, 2, 4]]
    alone = [finish(batch_of(opened), [job(prompt)])[0] for prompt in prompts]
    assert [together[place].token_ids for place in range(4)] == [end.token_ids for end in alone]


def test_how_a_prompt_is_cut_does_not_depend_on_the_others(opened: Any, one_thread: None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, prefill = [], TokenSequence.prefill

    def noting(self: TokenSequence, tokens: Any) -> Any:
        chunks.append(len(tokens))
        return prefill(self, tokens)

    monkeypatch.setattr(TokenSequence, "prefill", noting)
    finish(batch_of(opened), [job([1, 20 + row, *range(20, 218)], tokens=2) for row in range(3)])  # 600 tokens in all
    assert chunks == [200, 200, 200]


def test_sequences_too_short_to_be_reused_are_not_kept(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened, kept_tokens=10_000)
    finish(batch, [job([1, 5 + index], tokens=2) for index in range(8)])
    assert batch.pool.held_tokens == 0


def test_an_answer_that_nobody_wants_frees_its_place(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened, width=1)
    left, other = job([1, 5], tokens=200), job([1, 6], tokens=3)
    batch.add(left)
    batch.add(other)
    batch.step()
    assert (batch.active, batch.waiting) == (1, 1)
    left.cancelled = True
    ended = [each for _ in range(4) for each, event in batch.step() if isinstance(event, FinishedEvent)]
    assert ended == [other]


def test_a_broken_step_ends_its_answers_and_no_others(opened: Any, one_thread: None) -> None:
    batch = batch_of(opened)
    ends = finish(batch, [job([1, 5]), job([1, 10**6])])
    assert isinstance(ends[1], Failure)
    assert ends[0].reason == "length"


def test_a_failed_allocation_in_one_answer_leaves_the_outcomes_of_the_others(
        opened: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, prefill_together = TokenSequence.prefill, batching.prefill_together

    def failing(self: TokenSequence, tokens: Any) -> Any:
        if 77 in tokens:
            raise MemoryError("out of memory")
        return prefill(self, tokens)

    def failing_together(model: Any, sequences: Any, prompts: Any) -> Any:
        if any(77 in tokens for tokens in prompts):
            raise MemoryError("out of memory")
        return prefill_together(model, sequences, prompts)

    monkeypatch.setattr(TokenSequence, "prefill", failing)
    monkeypatch.setattr(batching, "prefill_together", failing_together)
    ends = finish(batch_of(opened), [job([1, 5], tokens=1), job([1, 77]), job([1, 6], tokens=1)])
    assert isinstance(ends[1], Failure)
    assert "out of memory" in str(ends[1].error)
    assert [ends[place].reason for place in (0, 2)] == ["length", "length"]


def test_when_the_thread_of_a_model_dies_its_clients_hear_of_it(
        chat_model: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step

    def dying(self: Batch) -> Any:
        monkeypatch.setattr(Batch, "step", step)
        raise SystemExit("the driver is gone")

    with serve({"tiny": chat_model}, max_time=20) as client:
        monkeypatch.setattr(Batch, "step", dying)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        found = client.post("/v1/completions", json=body)
        assert found.status_code == 500
        assert "the driver is gone" in found.text
        assert client.post("/v1/completions", json=body).status_code == 200


def test_clients_that_leave_free_their_places_and_sigterm_waits_for_the_rest(chat_model: Path, start: Callable[..., Any]
                                                                              ) -> None:
    started, address = start(chat_model)
    model = chat_model.name
    body = {"model": model, "prompt": "x", "max_tokens": 700, "logit_bias": {"1": -100, "0": -100}}

    def figure(name: str) -> float:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])

    with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
        next(answer.iter_lines())  # and leaves
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json={**body, "n": 64}, timeout=httpx.Timeout(60, read=0.02))
    deadline = time.monotonic() + 60
    while figure("torchchat_answers_in_progress") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert figure("torchchat_answers_in_progress") == 0

    with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert started.wait(60) == 0


def test_who_waits_when_the_time_of_grace_is_over_is_told_so(chat_model: Path, start: Callable[..., Any]) -> None:
    started, address = start(chat_model, "--grace", 0)
    body = {"model": chat_model.name, "prompt": "x", "max_tokens": 900, "n": 64, "logit_bias": {"1": -100, "0": -100}}

    def ask(stream: bool) -> httpx.Response:
        return httpx.post(f"{address}/v1/completions", json={**body, "stream": stream}, timeout=60)

    with ThreadPoolExecutor(2) as pool:
        whole, streamed = [pool.submit(ask, stream) for stream in (False, True)]
        while "torchchat_answers_in_progress 128" not in httpx.get(f"{address}/metrics").text:
            assert not whole.done()
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        found = whole.result()
        assert (found.status_code, found.json()["error"]["type"]) == (503, "server_error")
        *_, error, done, _ = streamed.result().text.split("\n\n")
        assert "the server ends" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
    assert started.wait(60) == 0


def test_headers_without_end_are_not_kept(chat_model: Path, start: Callable[..., Any]) -> None:
    _, address = start(chat_model)
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        with contextlib.suppress(ConnectionError):  # it is closed while we still send
            for number in range(4000):
                connection.sendall(b"x-%d: %s\r\n" % (number, b"a" * 1000))
            pytest.fail("4 MB of headers were taken")
    assert httpx.get(f"{address}/health").status_code == 200


def test_models_are_loaded_when_asked_for_and_make_room(testdata: Path, chat_model: Path, serve: Callable[..., Any]
                                                        ) -> None:
    models = {"a": testdata / "hf" / "stories260K", "b": testdata / "hf" / "TinyStories-656K", "c": chat_model}

    def loaded(client: TestClient) -> set[str]:
        return {entry["id"] for entry in client.get("/v1/models").json()["data"] if "max_model_len" in entry}

    with serve(models, memory_limit=3) as client:
        assert loaded(client) == {"a"}
        for name, here in (("c", {"a", "c"}), ("b", {"b", "c"}), ("a", {"a"})):  # least recently used ones go first
            found = client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2})
            assert found.status_code == 200, found.text
            assert loaded(client) == here
    with serve(models, memory_limit=1) as client:
        found = client.post("/v1/completions", json={"model": "b", "prompt": "x"})
        assert found.status_code == 503
        assert "--memory-limit" in found.json()["error"]["message"]


def test_a_model_that_cannot_be_loaded_ends_the_command(torchchat: Callable[..., Any], tmp_path: Path) -> None:
    found = torchchat("server", tmp_path, "--port", "0")
    assert found.code == 1
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "x=a", "--model", "x=b"], "two models are called 'x'"),
    (["--max-queue", "-1"], "--max-queue is -1"),
    (["--api-key", ""], "--api-key is empty"),
])
def test_wrong_options_are_told_before_anything_is_loaded(torchchat: Callable[..., Any], arguments: list[str],
                                                          message: str) -> None:
    found = torchchat("server", *arguments)
    assert found.code == 2
    assert message in found.err
