"""lm-eval's own models for servers: scores and answers are those that the model gives in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry

pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
models = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
PAIRS = [("Once upon a time, there was a", " little girl"), ("Lily and Tom went to the", " park to play"),
         ("The big dog was very", " happy"), ("The big dog was very", " big tree")]
TEXT = "Once upon a time there was a little girl. " * 8


@pytest.fixture(scope="module")
def folder(testdata: Path) -> Path:
    return testdata / "hf" / "stories260K"


@pytest.fixture(scope="module")
def address(folder: Path, start: Callable[..., Any]) -> str:
    return str(start(folder)[1])


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=index) for index, each in enumerate(arguments)]


def by_hand(folder: Path, before: list[int], whole: list[int]) -> tuple[float, bool]:
    """The log-probability of a continuation, and whether it is greedy, from logits of the whole."""
    with open_model(ModelRequest(model=str(folder)), load_registry()) as opened:
        session: Any = opened.model.session()
        rows = session.score(whole).double().log_softmax(-1)
        places = range(len(before), len(whole))
        return (sum(float(rows[place - 1, whole[place]]) for place in places),
                all(int(rows[place - 1].argmax()) == whole[place] for place in places))


@pytest.mark.parametrize("together", [1, 4])
def test_local_completions_scores_and_answers_as_the_model_does(address: str, folder: Path, together: int) -> None:
    model = models.LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model=folder.name, tokenizer_backend="huggingface",
        tokenizer=str(folder), max_length=256, num_concurrent=together, max_retries=1, batch_size=2)
    expected = [by_hand(folder, model.tok_encode(context), model.tok_encode(context + continuation))
                for context, continuation in PAIRS]
    found = model.loglikelihood(asked("loglikelihood", *PAIRS))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert model.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))[0] < -20
    answers = model.generate_until(asked("generate_until", ("Once upon a", {"until": ["."], "max_gen_toks": 24})))
    assert answers[0].startswith(" time")
    assert "." not in answers[0]


def test_local_completions_takes_texts_as_well_as_tokens(address: str, folder: Path) -> None:
    model = models.LocalCompletionsAPI(base_url=f"{address}/v1/completions", model=folder.name, tokenizer_backend=None,
                                       tokenized_requests=False, max_retries=1)
    answers = model.generate_until(asked("generate_until", ("Once upon a", {"until": ["."], "max_gen_toks": 24})))
    assert answers[0].startswith(" time")


def test_local_chat_completions_gets_answers(address: str, folder: Path) -> None:
    model = models.LocalChatCompletion(base_url=f"{address}/v1/chat/completions", model=folder.name, max_retries=1)
    given = model.apply_chat_template([{"role": "user", "content": "Tell me a story"}])
    answers = model.generate_until(asked("generate_until", (given, {"until": ["\n"], "max_gen_toks": 16})))
    assert isinstance(answers[0], str)
    assert answers[0].strip()
