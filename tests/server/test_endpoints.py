"""What OpenAI's own client gets of every endpoint, streamed and not."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6,
                        "temperature": 0}


@pytest.fixture
def openai(client: TestClient) -> OpenAI:
    return OpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=client, max_retries=0)


def events(response: Any) -> list[Any]:
    """The data of server-sent events; the last one is "[DONE]"."""
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:])
            for line in response.text.split("\n") if line.startswith("data: ")]


def test_a_chat_completion_has_an_answer_usage_and_reason(openai: OpenAI) -> None:
    found = openai.chat.completions.create(**CHAT)
    assert found.object == "chat.completion"
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].message.content
    assert (found.usage.completion_tokens, found.usage.total_tokens) == (6, found.usage.prompt_tokens + 6)


def test_a_streamed_chat_says_the_same_and_ends_with_usage(openai: OpenAI) -> None:
    whole = openai.chat.completions.create(**CHAT)
    chunks = list(openai.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done(client: TestClient) -> None:
    found = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert found[-1] == "[DONE]"
    assert all(event["object"] == "chat.completion.chunk" for event in found[:-1])
    assert len({event["id"] for event in found[:-1]}) == 1


def test_several_choices_differ_and_have_the_seeds_answers(openai: OpenAI) -> None:
    asked = {**CHAT, "temperature": 1.0, "seed": -7, "n": 3}
    first, again = (openai.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


def test_logprobs_are_of_the_chosen_tokens(openai: OpenAI) -> None:
    found = openai.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    entries = found.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert [top.logprob for top in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs),
                                                                    reverse=True)


def test_a_stop_string_ends_the_answer_before_it(openai: OpenAI) -> None:
    whole = openai.chat.completions.create(**{**CHAT, "max_tokens": 20}).choices[0].message.content
    stop = whole[4:6]
    found = openai.chat.completions.create(**{**CHAT, "max_tokens": 20}, stop=[stop]).choices[0]
    assert (found.finish_reason, found.message.content) == ("stop", whole[: whole.index(stop)])


def test_logit_bias_decides(openai: OpenAI, client: TestClient) -> None:
    token = client.post("/tokenize", json={"prompt": "Q", "add_special_tokens": False}).json()["tokens"][0]
    found = openai.chat.completions.create(**CHAT, logit_bias={str(token): 100})
    assert found.choices[0].message.content == "Q" * 6


def test_a_text_completion_takes_texts_and_tokens(openai: OpenAI, client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": "Once"}).json()["tokens"]
    by_text = openai.completions.create(model="tiny", prompt=["Once", "Twice"], max_tokens=5, temperature=0)
    by_tokens = openai.completions.create(model="tiny", prompt=tokens, max_tokens=5, temperature=0)
    assert [choice.index for choice in by_text.choices] == [0, 1]
    assert by_text.choices[0].text == by_tokens.choices[0].text
    streamed = openai.completions.create(model="tiny", prompt="Once", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_tokens.choices[0].text


def test_an_echoed_prompt_is_scored(openai: OpenAI) -> None:
    """What evaluations ask: the log-probability of each token of a prompt, and no more."""
    scored = openai.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=2).choices[0]
    assert scored.text == "abc"
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    longer = openai.completions.create(model="tiny", prompt="abc", max_tokens=1, echo=True, logprobs=1,
                                       temperature=0).choices[0]
    assert longer.logprobs.token_logprobs[:3] == pytest.approx(scored.logprobs.token_logprobs, abs=1e-5)
    assert len(longer.logprobs.tokens) == 4


def test_an_end_token_has_its_log_probability(openai: OpenAI) -> None:
    found = openai.completions.create(model="tiny", prompt="abc", max_tokens=1, echo=True, logprobs=1, temperature=0,
                                      logit_bias={"1": 100}).choices[0]
    assert (found.finish_reason, found.text) == ("stop", "abc")
    assert found.logprobs.tokens == ["a", "b", "c", "</s>"]


def test_embeddings_have_length_one_in_both_encodings(openai: OpenAI, client: TestClient) -> None:
    found = openai.embeddings.create(model="tiny", input=["a cat", "a cat", "something else"])
    first, second, third = (item.embedding for item in found.data)
    assert first == second != third
    assert sum(value * value for value in first) == pytest.approx(1.0, abs=1e-5)
    body = client.post("/v1/embeddings", json={"model": "tiny", "input": "a cat", "encoding_format": "base64"}).json()
    data = base64.b64decode(body["data"][0]["embedding"])
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(first, abs=1e-6)


def test_a_response_streamed_and_not(openai: OpenAI) -> None:
    asked = {"model": "tiny", "input": "Hi", "max_output_tokens": 6, "temperature": 0}
    found = openai.responses.create(**asked)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.output_tokens == 6
    with openai.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    deltas = [event.delta for event in openai.responses.create(**asked, stream=True)
              if event.type == "response.output_text.delta"]
    assert "".join(deltas) == found.output_text


def test_a_response_takes_instructions_messages_and_results_of_calls(openai: OpenAI) -> None:
    found = openai.responses.create(model="tiny", instructions="Be brief.", max_output_tokens=3, input=[
        {"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"city\": \"Rome\"}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"}])
    assert found.usage.input_tokens > 40


def test_models_are_listed_and_described(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").owned_by == "torchchat"


def test_tokens_and_texts_go_both_ways(client: TestClient) -> None:
    found = client.post("/tokenize", json={"model": "tiny", "prompt": "Grüße"}).json()
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 1024)
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Grüße"}
    chat = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    assert client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == "user: Hiassistant: "


def test_metrics_count_what_happened(client: TestClient, openai: OpenAI) -> None:
    def figure(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])

    before = figure("torchchat_generated_tokens_total")
    openai.chat.completions.create(**CHAT)
    assert figure("torchchat_generated_tokens_total") == before + 6
    assert figure("torchchat_answers_in_progress") == 0


def test_a_repeated_prompt_comes_from_the_cache(openai: OpenAI) -> None:
    messages = [{"role": "user", "content": "A long prompt that nobody asked before: 31415926535"}]
    first, second = (openai.chat.completions.create(**{**CHAT, "messages": messages}) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    assert first.choices[0].message.content == second.choices[0].message.content


def test_the_end_token_counts_as_one_of_the_answer(client: TestClient) -> None:
    body = {"model": "tiny", "max_tokens": 5, "logit_bias": {"1": 100}}
    chat = client.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "Hi"}]}).json()
    text = client.post("/v1/completions", json={**body, "prompt": "Hi"}).json()
    for found in (chat, text):
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] == 1


def test_offsets_of_tokens_count_the_text_as_it_is_decoded(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": "a\u20acb</s>c", "echo": True, "logprobs": 0, "max_tokens": 2, "temperature": 0}
    found = client.post("/v1/completions", json=body).json()["choices"][0]
    offsets = found["logprobs"]["text_offset"]
    assert found["text"].startswith("a\u20acbc")
    assert offsets[:8] == [0, 1, 1, 1, 2, 3, 3, 4]  # three bytes are one character, and a control token is none
