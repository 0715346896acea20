"""The pages without a browser: what they draw, and what clicks do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tc_streamlit_chat.choices import offered
from tc_streamlit_chat.configuration import SAMPLING, Configuration
from tc_streamlit_chat.figures import Details
from tc_streamlit_chat.jobs import Jobs
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.pages.session import NAMED
from tc_streamlit_chat.remote import RemoteModels
from tc_streamlit_chat.services import Services, install
from tc_streamlit_chat.serving import PAGE
from tc_streamlit_chat.store import Conversations, Store
from tc_streamlit_chat.turns import Turns
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import ModelRequest, has_device
from torchchat_core.plugins import load_registry
from torchchat_core.specs import DTYPES

SECONDS = 60


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[LocalModels, Turns]]:
    found = LocalModels(ModelRequest(), load_registry(), max_loaded=2, memory_limit=0)
    turns = Turns(found)
    turns.run(found.load(found.base, lambda _: None)).result(SECONDS)
    yield found, turns
    turns.close()


@pytest.fixture
def services(models: tuple[LocalModels, Turns], tmp_path: Path) -> Iterator[Services]:
    start = Configuration(sampling={"temperature": 0.0}, max_new_tokens=40)
    made = Services(registry=models[0].registry, models=models[0], turns=models[1], store=Store(tmp_path / "c"),
                    jobs=Jobs(), start=start, private=True)
    install(made)
    yield made
    install(None)
    made.jobs.close()


def opened(**query: str) -> AppTest:
    page = AppTest.from_file(str(PAGE), default_timeout=SECONDS)
    for name, value in query.items():
        page.query_params[name] = value
    return run(page)


def run(page: AppTest) -> AppTest:
    page.run()
    assert not page.exception, page.exception
    return page


def say(page: AppTest, text: str) -> AppTest:
    page.chat_input(key="message").set_value(text)
    return run(page)


def answered(page: AppTest, services: Services) -> AppTest:
    """The page once the answer of its conversation is there."""
    turn = services.turns.at(page.session_state["conversation"])
    assert turn is not None
    assert turn.done.wait(SECONDS)
    return run(page)


def texts(page: AppTest) -> list[str]:
    return [each.value for each in page.markdown]


def test_an_idea_becomes_a_conversation(services: Services) -> None:
    page = opened()
    page.button(key="idea-0").click()
    page = answered(run(page), services)
    assert any(text.startswith("I am the small model") for text in texts(page))
    assert [each.title for each in Conversations(services.store, "").listed()] == ["Who are you?"]
    assert any("tokens/s" in each.value for each in page.caption)


def test_a_message_is_kept_before_it_is_answered(services: Services) -> None:
    page = opened()
    say(page, "Who are you?")
    mine = Conversations(services.store, "")
    conversation = page.session_state["conversation"]
    assert [each.content for each in mine.messages(conversation)][:1] == ["Who are you?"]
    assert page.query_params[NAMED] in (conversation, [conversation])
    answered(page, services)
    again = opened(**{NAMED: conversation})
    assert any(text.startswith("I am the small model") for text in texts(again))


def test_regenerating_keeps_both_answers(services: Services) -> None:
    page = opened()
    page = answered(say(page, "Who are you?"), services)
    next(each for each in page.button if str(each.key).startswith("again-")).click()
    page = answered(run(page), services)
    assert any(each.value == "2 of 2" for each in page.caption)
    next(each for each in page.button if str(each.key).startswith("back-")).click()
    page = run(page)
    assert any(each.value == "1 of 2" for each in page.caption)


def test_a_question_without_an_answer_can_be_answered_later(services: Services) -> None:
    mine = Conversations(services.store, "")
    conversation = mine.create("Who are you?", services.start.to_json())
    mine.add(conversation, "user", [("Who are you?", Details())])
    page = opened(**{NAMED: conversation})
    page.button(key="answer").click()
    page = answered(run(page), services)
    assert [each.role for each in mine.messages(conversation)] == ["user", "assistant"]


def test_what_goes_wrong_is_told_as_a_sentence(services: Services) -> None:
    mine = Conversations(services.store, "")
    conversation = mine.create("x", Configuration(model="no-such-model").to_json())
    mine.add(conversation, "user", [("Hello", Details())])
    page = opened(**{NAMED: conversation})
    page.button(key="answer").click()
    page = answered(run(page), services)
    assert "no\\-such\\-model" in page.error[0].value
    assert "Traceback" not in page.error[0].value
    assert "no conversation" not in page.error[0].value


def test_a_conversation_that_is_gone_is_told(services: Services) -> None:
    page = opened(**{NAMED: "nothing"})
    assert page.toast
    assert any("What shall we talk about?" in text for text in texts(page))


def test_every_sampling_option_has_a_control(services: Services) -> None:
    page = opened()
    page.button(key="settings").click()
    page = run(page)
    keys = " ".join(str(each.key) for kind in (page.number_input, page.text_input, page.text_area) for each in kind)
    assert all(f"{name}-new-" in keys for name in SAMPLING)
    assert {each.label for each in page.selectbox} >= {"Model", "Executor", "Recipe", "Device", "Dtype"}
    executor = next(each for each in page.selectbox if each.label == "Executor")
    assert {"auto", "eager"} <= set(executor.options)
    assert "executorch" not in executor.options


def test_settings_belong_to_the_conversation(services: Services) -> None:
    page = opened()
    page.button(key="settings").click()
    page = run(page)
    next(each for each in page.number_input if str(each.key).startswith("length-")).set_value(3)
    next(each for each in page.text_area if str(each.key).startswith("system-")).set_value("Be kind.")
    next(each for each in page.button if str(each.key).startswith("apply-")).click()
    page = answered(say(run(page), "Who are you?"), services)
    found = Conversations(services.store, "").listed()[0]
    configuration = Configuration.from_json(found.configuration)
    assert (configuration.max_new_tokens, configuration.system) == (3, "Be kind.")
    assert configuration.sampling == {"temperature": 0.0}
    assert any("3 tokens" in each.value for each in page.caption)


def picker(page: AppTest, label: str) -> Any:
    return next(each for each in page.selectbox if each.label == label)


def test_device_and_dtype_are_chosen_and_every_choice_leaves_what_fits(services: Services) -> None:
    page = opened()
    page.button(key="settings").click()
    page = run(page)
    assert picker(page, "Device").options == ["the fastest here (cpu)", "cpu"] or has_device("cuda")
    assert picker(page, "Dtype").options == ["as the model is", *DTYPES]
    assert [name for name in picker(page, "Model").options if name.startswith("embedded")] == ["embedded:guide"]
    picker(page, "Dtype").set_value("fp32")
    picker(page, "Device").set_value("cpu")
    page = run(page)
    next(each for each in page.button if str(each.key).startswith("apply-")).click()
    page = answered(say(run(page), "Who are you?"), services)
    configuration = Configuration.from_json(Conversations(services.store, "").listed()[0].configuration)
    assert (configuration.device, configuration.dtype) == ("cpu", "fp32")
    assert any("eager, cpu, fp32" in each.value for each in page.caption)


def test_a_model_that_is_typed_is_not_downloaded_by_its_name_alone(services: Services,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tc_streamlit_chat.choices.fitting", lambda *_: pytest.fail("it was looked at"))
    page = opened()
    page.session_state["draft"] = Configuration(model="owner/name")
    page.session_state["settings_open"] = True
    page = run(page)
    assert any("with the first question; what it can be run with" in each.value for each in page.caption)
    assert picker(page, "Model").value == "owner/name"


@pytest.mark.parametrize(("typed", "shown"), [("float32", "fp32"), ("fast", "fast"), (None, "")])
def test_the_pickers_begin_with_what_the_command_line_says(services: Services, typed: str | None, shown: str) -> None:
    from dataclasses import replace

    services.models.base = replace(services.models.base, dtype=typed)  # type: ignore[union-attr]
    page = opened()
    page.button(key="settings").click()
    assert picker(run(page), "Dtype").value == shown
    services.models.base = replace(services.models.base, dtype=None)  # type: ignore[union-attr]


def test_strangers_choose_from_what_is_here(models: tuple[LocalModels, Turns], services: Services) -> None:
    from dataclasses import replace

    install(replace(services, private=False))
    page = opened()
    page.session_state["draft"] = Configuration(model="/etc/passwd")
    page.session_state["settings_open"] = True
    page = run(page)
    assert "cannot be chosen here" in page.error[0].value


def test_what_was_not_offered_is_refused() -> None:
    offered(["eager", "compile"], ("eager", "compile"))
    with pytest.raises(TorchchatError, match="'/etc/passwd' cannot be chosen here"):
        offered(["eager", "/etc/passwd"], ("eager", "compile"))


def test_pages_of_a_server_elsewhere_have_what_it_can_do(services: Services) -> None:
    from dataclasses import replace

    remote = RemoteModels("http://127.0.0.1:9", None, "one")
    remote.models = ("one", "two")
    install(replace(services, models=remote))
    page = opened()
    page.session_state["settings_open"] = True
    page = run(page)
    boxes: dict[str, Any] = {each.label: each for each in page.selectbox}
    assert boxes["Model"].options == ["one", "two"]
    assert "Executor" not in boxes
