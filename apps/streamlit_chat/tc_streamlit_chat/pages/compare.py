"""One prompt, two configurations side by side, and how far the two models agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import streamlit as st

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.jobs import Job
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.markdown import plain
from tc_streamlit_chat.pages import frame
from tc_streamlit_chat.pages.settings import model_pickers
from tc_streamlit_chat.questions import Question, Said
from tc_streamlit_chat.services import Services
from tc_streamlit_chat.turns import Turn

SIDES = ("left", "right")
NAMES = {"left": "First", "right": "Second"}
TOKENS = 200  # of an answer, at first
CHARACTERS = 4000  # of the text that both are verified on


@frame.guarded
def page() -> None:
    """The whole page."""
    services = frame.services()
    with st.container(key="wide"):
        st.markdown("#### Compare", anchors=False)
        st.caption("One prompt, two ways to answer it. With temperature 0, differences are those of the models.")
        prompt, settings = _question(services)
        configurations = _pickers(services, settings)
        running = any(_running(services, side) for side in SIDES)
        with st.container(horizontal=True):
            asked = st.button("Ask both", type="primary", icon=":material/compare_arrows:", key="ask-both",
                              disabled=running, shortcut="Ctrl+Enter")
            verified = not services.models.remote and st.button(
                "Verify", icon=":material/rule:", key="verify", help="Run the same text through both models, and "
                "compare what they make of every token: torchchat verify")
        if asked:
            _ask(services, prompt, configurations)
        if verified:
            _verify(services, configurations)
        _answers(services, running)
        _verification(services)


# ---- what is asked -------------------------------------------------------------------------------------------------


def _question(services: Services) -> tuple[str, Configuration]:
    """The prompt, and what both configurations have in common."""
    prompt = st.text_area("Prompt", key="compared-prompt", height=100, max_chars=100_000,
                          placeholder="What both are asked") or ""
    start = services.start
    with st.container(horizontal=True):
        temperature = st.number_input("Temperature", min_value=0.0, max_value=100.0, step=0.05,
                                      value=float(start.sampling.get("temperature", 0.0)), key="compared-temperature",
                                      width=180)
        length = st.number_input("Longest answer, tokens", min_value=1, max_value=1 << 20, step=1,
                                 value=start.max_new_tokens or TOKENS, key="compared-length", width=200)
    return prompt, replace(start, sampling={**start.sampling, "temperature": temperature}, max_new_tokens=length,
                           num_samples=1)


def _pickers(services: Services, settings: Configuration) -> dict[str, Configuration]:
    found = {}
    for side, column in zip(SIDES, st.columns(2, gap="medium"), strict=True):
        with column, st.container(border=True):
            st.markdown(f"**{NAMES[side]}**")
            found[side] = model_pickers(services, settings, f"compare-{side}")
    if found["left"] == found["right"]:
        st.caption("Both are the same now: choose another model, or another way to run it, on one side.")
    return found


def _place(side: str) -> str:
    return f"compare-{side}-{frame.tab()}"


def _running(services: Services, side: str) -> bool:
    turn = services.turns.at(_place(side))
    return turn is not None and not turn.done.is_set()


def _ask(services: Services, prompt: str, configurations: Mapping[str, Configuration]) -> None:
    if not prompt.strip():
        st.warning("Write a prompt first.", icon=":material/edit_note:")
        return
    for side, configuration in configurations.items():
        question = Question(messages=[Said(role="user", content=prompt)], configuration=configuration,
                            asker=_place(side))
        services.turns.start(_place(side), question)
    st.rerun()


# ---- the answers ---------------------------------------------------------------------------------------------------


def _answers(services: Services, running: bool) -> None:
    turns = {side: services.turns.at(_place(side)) for side in SIDES}
    if running:
        _live(services, turns)
    elif any(turns.values()):
        _both(services, turns)
        texts = [turn.samples[0].text for turn in turns.values() if turn is not None and turn.error is None]
        if len(texts) == len(SIDES):
            st.caption(_shared(*texts))


@st.fragment(run_every=frame.REFRESH)
@frame.guarded
def _live(services: Services, turns: Mapping[str, Turn | None]) -> None:
    if all(turn is None or turn.done.is_set() for turn in turns.values()):
        st.rerun()
    _both(services, turns)
    if st.button("Stop", icon=":material/stop_circle:", key="stop-both", shortcut="Esc"):
        for turn in turns.values():
            if turn is not None:
                turn.stop()


def _both(services: Services, turns: Mapping[str, Turn | None]) -> None:
    for (side, turn), column in zip(turns.items(), st.columns(2, gap="medium"), strict=True):
        if turn is None:
            continue
        with column, st.container(border=True, key=f"compared-{side}"):
            st.caption(frame.model_line(services, turn.question.configuration))
            sample = turn.samples[0]
            if not turn.done.is_set():
                frame.show_progress(turn, sample)
                continue
            if sample.text:
                frame.show_text("assistant", sample.text)
            st.caption(plain(sample.stopped(turn.started).line if turn.error is None else ""))
            if turn.error is not None:
                frame.show_error(turn.error)


def _shared(first: str, second: str) -> str:
    """How far two answers are the same."""
    if first == second:
        return "Both answers are the same, character by character."
    shared = next((place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                  min(len(first), len(second)))
    return f"The answers are the same for the first {shared} of {max(len(first), len(second))} characters."


# ---- verify --------------------------------------------------------------------------------------------------------


def _verify(services: Services, configurations: Mapping[str, Configuration]) -> None:
    if not isinstance(services.models, LocalModels):
        return
    services.jobs.start(_place("verify"), "verify", verification(services.models, configurations))
    st.rerun()


def verification(models: LocalModels, configurations: Mapping[str, Configuration]) -> Callable[..., Any]:
    """What a job does to compare the two models' logits."""
    first, second = (configurations[side].request(models.base) for side in SIDES)

    def work(_: Callable[[], bool]) -> Any:
        from torchchat_core.measure.text import measured_text
        from torchchat_core.measure.verifying import verify

        return verify(first, second, models.registry, measured_text(characters=CHARACTERS))

    return work


def _verification(services: Services) -> None:
    job = services.jobs.at(_place("verify"))
    if job is None:
        return
    st.divider()
    st.markdown("**Do they agree?**")
    if not job.done.is_set():
        watch(job)
    elif job.error is not None:
        frame.show_error(job.error)
    elif job.result is None:
        st.caption("Given up.")
    else:
        _show_verification(job.result)


@st.fragment(run_every=0.5)
@frame.guarded
def watch(job: Job) -> None:
    """How far a measurement is, and a button that ends it."""
    if job.done.is_set():
        st.rerun()
    status = job.status
    st.progress(status.share if status.share is not None else 0.0, plain(status.text))
    if st.button("Stop", icon=":material/stop_circle:", key=f"stop-{job.place}"):
        job.stop()


def _show_verification(found: Any) -> None:
    from torchchat_core.measure.verdict import limits_text, verification_lines

    agreement = found.agreement
    if found.agrees:
        st.success(f"They agree, by the limits for {plain(limits_text(found))}.", icon=":material/check_circle:")
    else:
        st.warning("They do not agree:  \n" + "  \n".join(plain(each) for each in found.objections),
                   icon=":material/difference:")
    figures = [("Same likeliest token", f"{100 * agreement.top_1:.1f} %", f"at {agreement.positions} positions"),
               ("Mean KL divergence", f"{agreement.mean_kl:.2g}", "nats"),
               ("KL divergence, p99", f"{agreement.p99_kl:.2g}", "nats"),
               ("Largest difference", f"{agreement.largest_difference:.2g}", "of two logits"),
               ("Greedy tokens in common", f"{agreement.greedy_agreed} of {agreement.greedy_tokens}", "")]
    with st.container(horizontal=True, key="verified"):
        for name, value, unit in figures:
            st.metric(name, value, help=unit or None, border=True, width=190)
    with st.expander("As torchchat verify prints it"):
        st.code("\n".join(verification_lines(found)), language=None, wrap_lines=True)
