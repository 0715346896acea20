"""Answers on their own thread: from a model in this process, and from a server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.local import LocalModels, continued
from tc_streamlit_chat.questions import Question, Said, in_turns
from tc_streamlit_chat.remote import RemoteModels
from tc_streamlit_chat.turns import Outcome, Turn, Turns
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import load_registry

GREEDY = {"temperature": 0.0}
WAIT = 60


def question(*messages: str, **settings: Any) -> Question:
    said = [Said(role="assistant" if number % 2 else "user", content=text) for number, text in enumerate(messages)]
    return Question(messages=said, configuration=Configuration(**{"sampling": GREEDY, **settings}))


def done(turn: Turn) -> Turn:
    assert turn.done.wait(WAIT)
    return turn


@pytest.fixture(scope="module")
def turns() -> Iterator[Turns]:
    """With the model that comes along, and room for two."""
    found = Turns(LocalModels(ModelRequest(), load_registry(), max_loaded=2, memory_limit=0))
    yield found
    found.close()


def test_an_answer_comes_with_its_figures_and_is_handed_over_once(turns: Turns) -> None:
    kept: list[Outcome] = []
    turn = done(turns.start("a", question("Who are you?"), kept.append))
    sample = turn.samples[0]
    assert turn.error is None
    assert sample.text.startswith("I am the small model")
    assert sample.details is not None
    assert sample.details.reason == "stop"
    assert sample.details.figures.new_tokens == sample.tokens
    assert "tokens/s" in sample.details.line
    assert kept == [[(sample.text, sample.details)]]


def test_answers_to_many_at_once_do_not_mix(turns: Turns) -> None:
    questions = ["Who are you?", "Tell me a short story.", "What is torchchat?", "How do I quantise a model?"]
    alone = [done(turns.start(f"alone-{text}", question(text))).samples[0].text for text in questions]
    together = [turns.start(f"together-{text}", question(text)) for text in questions]
    assert [done(turn).samples[0].text for turn in together] == alone
    assert len(set(alone)) == len(alone)


def test_several_answers_to_one_question(turns: Turns) -> None:
    turn = done(turns.start("several", question("Tell me a short story.", sampling={"temperature": 1.0, "seed": 1},
                                                num_samples=3, max_new_tokens=20)))
    texts = [sample.text for sample in turn.samples]
    assert len(set(texts)) == 3
    assert all(sample.details and sample.details.reason == "length" for sample in turn.samples)


def test_a_stopped_answer_keeps_what_was_said_and_frees_the_model(turns: Turns) -> None:
    kept: list[Outcome] = []
    bias = {"sampling": {"temperature": 1.0, "logit_bias": {0: -1e4, 1: -1e4}}}
    turn = turns.start("stopped", question("Tell me a long story.", **bias), kept.append)
    deadline = time.monotonic() + WAIT
    while not turn.samples[0].text and time.monotonic() < deadline:
        time.sleep(0.001)
    turn.stop()
    done(turn)
    text, details = kept[0][0]
    assert text
    assert turn.samples[0].text == text
    assert details.reason in ("cancelled", "stop", "length")
    assert done(turns.start("stopped", question("Who are you?"))).samples[0].text.startswith("I am")


def test_a_question_that_is_stopped_before_it_begins_is_no_answer(turns: Turns) -> None:
    kept: list[Outcome] = []
    turn = turns.start("at once", question("Who are you?"), kept.append)
    turn.stop()
    done(turn)
    assert turn.error is None
    assert not kept or kept[0][0][0]


def test_one_place_has_one_answer_at_a_time(turns: Turns) -> None:
    turn = turns.start("busy", question("Tell me a short story."))
    with pytest.raises(TorchchatError, match="is being written here"):
        turns.start("busy", question("Who are you?"))
    done(turn)


def test_messages_that_wait_are_kept_for_one_taker_and_go_with_their_conversation(turns: Turns) -> None:
    assert turns.take_waiting("w") is None
    turns.keep_waiting("w", "one")
    turns.keep_waiting("w", "two")
    turns.keep_waiting("x", "three")
    assert turns.waiting("w") == "one\n\ntwo"
    assert (turns.take_waiting("w"), turns.take_waiting("w")) == ("one\n\ntwo", None)
    turns.forget("x")
    assert turns.waiting("x") is None


@pytest.mark.parametrize(("settings", "message"), [
    ({"model": "no-such-model"}, "no model 'no-such-model'"),
    ({"quantize": "linear:int3"}, "linear:int3"),
    ({"executor": "nonsense"}, "nonsense"),
])
def test_what_cannot_be_is_told_and_the_next_answer_comes(turns: Turns, settings: dict[str, str], message: str
                                                          ) -> None:
    turn = done(turns.start("wrong", question("Hello", **settings)))
    assert turn.error is not None
    assert message in turn.error.message
    assert done(turns.start("wrong", question("Who are you?"))).error is None


def test_a_message_that_is_too_long_is_told(turns: Turns) -> None:
    turn = done(turns.start("long", question("word " * 20_000)))
    assert turn.error is not None
    assert "tokens" in turn.error.message


def test_a_long_conversation_loses_its_oldest_messages_and_says_so(turns: Turns) -> None:
    turn = done(turns.start("full", question(*["Tell me a story. " * 20, "Once. " * 60] * 12, "Who are you?",
                                             max_new_tokens=10)))
    assert turn.error is None
    details = turn.samples[0].details
    assert details is not None
    assert "the oldest" in details.notice


def test_a_model_is_loaded_once_and_others_make_room(turns: Turns) -> None:
    models = turns.backend
    assert isinstance(models, LocalModels)
    for recipe in ("linear:int8", "linear:int4", ""):
        done(turns.start(f"room-{recipe}", question("Who are you?", quantize=recipe)))
    known = [Configuration(quantize=recipe).request(models.base) for recipe in ("linear:int8", "linear:int4", "")]
    assert [models.known(request) is not None for request in known] == [False, True, True]
    loaded = models.known(known[1])
    assert loaded is not None
    assert loaded.schemes == ("linear:int4",)


def test_a_model_without_a_template_continues_the_text(turns: Turns, testdata: Any) -> None:
    model = str(testdata / "hf" / "TinyStories-656K")
    turn = done(turns.start("text", question("Once upon a time", model=model, max_new_tokens=12)))
    assert turn.error is None
    again = done(turns.start("text", question("Once upon a time", turn.samples[0].text, "Then", model=model,
                                              max_new_tokens=12)))
    assert again.error is None
    refused = done(turns.start("text", question("Once", model=model, system="Be kind.")))
    assert refused.error is not None
    assert "no system prompt" in refused.error.message
    dialogue = done(turns.start("text", question("Once", model=model, system="Be kind.", transcript=True,
                                                 max_new_tokens=12)))
    assert dialogue.error is None


def test_a_question_without_an_answer_and_the_next_one_are_one_message() -> None:
    said = [Said(role="user", content="Hello?"), Said(role="user", content="Who are you?"),
            Said(role="assistant", content="A model."), Said(role="user", content="Good.")]
    assert in_turns(said) == [{"role": "user", "content": "Hello?\n\nWho are you?"},
                              {"role": "assistant", "content": "A model."}, {"role": "user", "content": "Good."}]
    assert len(said) == 4


def test_texts_are_joined_where_words_would_run_together() -> None:
    said = [Said(role="user", content="Once"), Said(role="assistant", content=" upon a time"),
            Said(role="user", content="there was"), Said(role="assistant", content=", long ago."),
            Said(role="user", content="\nThen")]
    assert continued(said) == "Once upon a time there was, long ago.\nThen"


# ---- a server elsewhere --------------------------------------------------------------------------------------------


class FakeServer(BaseHTTPRequestHandler):
    """Answers as the test says, and keeps what it was asked."""

    lines: ClassVar[list[str]] = []
    status = 200
    asked: ClassVar[list[dict[str, Any]]] = []
    left = threading.Event()

    def do_GET(self) -> None:
        self._answer(self.status, json.dumps({"data": [{"id": "one"}, {"id": "two"}]}
                                             if self.status == 200 else {"error": {"message": "the key is wrong"}}))

    def do_POST(self) -> None:
        type(self).asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if self.status != 200:
            self._answer(self.status, json.dumps({"error": {"message": "top_k is not known"}}))
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            for line in self.lines:
                while line == "wait":
                    self.wfile.write(b": still here\n\n")
                    self.wfile.flush()
                    time.sleep(0.01)
                self.wfile.write(f"data: {line}\n\n".encode())
        except OSError:
            self.left.set()

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None: ...


def piece(text: str | None = None, index: int = 0, **more: Any) -> str:
    return json.dumps({"choices": [{"index": index, "delta": {"content": text} if text else {}, **more}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Turns]]:
    """`server(lines, status)`: turns whose answers come from a server that says so."""
    monkeypatch.setattr(FakeServer, "asked", [])
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    opened: list[Turns] = []

    def start(lines: list[str], status: int = 200) -> Turns:
        monkeypatch.setattr(FakeServer, "lines", lines)
        monkeypatch.setattr(FakeServer, "status", status)
        models = RemoteModels(f"http://127.0.0.1:{httpd.server_port}", None, "one")
        opened.append(Turns(models))
        return opened[-1]

    yield start
    for turns in opened:
        turns.close()
    httpd.shutdown()
    httpd.server_close()


def test_a_servers_answer_streams_with_its_counts(server: Callable[..., Turns]) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2,
                                      "prompt_tokens_details": {"cached_tokens": 4}}}
    turns = server([piece("Hel"), piece("lo"), piece(finish_reason="stop"), json.dumps(usage), "[DONE]"])
    turn = done(turns.start("a", question("Hi", system="Be kind.", max_new_tokens=5, stop=("\n",))))
    assert turn.error is None
    details = turn.samples[0].details
    assert details is not None
    assert (turn.samples[0].text, details.reason) == ("Hello", "stop")
    assert (details.figures.new_tokens, details.figures.prompt_tokens, details.figures.prefilled_tokens) == (2, 9, 5)
    asked = FakeServer.asked[0]
    assert asked["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert (asked["model"], asked["max_tokens"], asked["stop"], asked["temperature"]) == ("one", 5, ["\n"], 0.0)
    assert "top_k" not in asked  # nobody chose it, and not every server knows it


def test_several_answers_of_a_server(server: Callable[..., Turns]) -> None:
    turns = server([piece("a", 0), piece("b", 1), piece("c", 0), piece("x", 9), "[DONE]"])
    turn = done(turns.start("a", question("Hi", num_samples=2)))
    assert [sample.text for sample in turn.samples] == ["ac", "b"]
    assert FakeServer.asked[0]["n"] == 2


@pytest.mark.parametrize(("lines", "status", "message"), [
    ([], 400, "top_k is not known"), (["nonsense"], 200, "not JSON"), (["[1]"], 200, "not an event"),
    ([piece("a"), json.dumps({"error": {"message": "out of memory"}})], 200, "out of memory"),
])
def test_a_server_that_fails_is_told(server: Callable[..., Turns], lines: list[str], status: int, message: str) -> None:
    turn = done(server(lines, status).start("a", question("Hi")))
    assert turn.error is not None
    assert message in turn.error.message


def test_stopping_leaves_the_server(server: Callable[..., Turns]) -> None:
    FakeServer.left.clear()
    turn = server([piece("Hel"), "wait"]).start("a", question("Hi"))
    deadline = time.monotonic() + WAIT
    while not turn.samples[0].text and time.monotonic() < deadline:
        time.sleep(0.005)
    turn.stop()
    done(turn)
    assert turn.samples[0].text == "Hel"
    assert FakeServer.left.wait(WAIT)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(TorchchatError, match="cannot be reached"):
        RemoteModels("http://127.0.0.1:9", None, None).connect()
    for url in ("file:///etc/passwd", "ftp://example.org", "nonsense", "http://"):
        with pytest.raises(TorchchatError, match="--url is"):
            RemoteModels(url, None, None)
