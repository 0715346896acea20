"""The conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import streamlit as st

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.figures import Details
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.markdown import plain
from tc_streamlit_chat.pages import frame
from tc_streamlit_chat.pages.conversation_list import conversation_list, more_menu
from tc_streamlit_chat.pages.session import CURRENT, DRAFT, EDITED, NAMED, OPENED, SETTINGS, show_conversation
from tc_streamlit_chat.pages.settings import settings_dialog
from tc_streamlit_chat.questions import Question, Said
from tc_streamlit_chat.services import Services
from tc_streamlit_chat.store import Conversation, Conversations, StoredMessage
from tc_streamlit_chat.turns import Outcome, Turn

MOST_CHARACTERS = 200_000  # of a message
IDEAS = {True: ("Who are you?", "Tell me a short story.", "What can I do with torchchat?"),
         False: ("Once upon a time", "One day, a little girl named Lily", "The old lighthouse")}


@frame.guarded
def page() -> None:
    """The whole page."""
    services = frame.services()
    mine = frame.conversations(services)
    current = _current(mine)
    turn = services.turns.at(current.id) if current is not None else None
    live = turn is not None and not turn.done.is_set()
    with st.sidebar:
        conversation_list(services, mine, current)
    configuration = _configuration(services, current)
    _heading(services, mine, current, configuration)
    messages = mine.messages(current.id) if current is not None else []
    idea = _welcome(services, configuration) if not messages and turn is None else None
    _messages(services, mine, current, messages, live)
    if live and turn is not None:
        _live(turn)
    elif current is not None:
        _after(services, mine, current, messages, turn)
    if current is not None:
        _waiting(services, mine, current, live, ready=bool(messages) and messages[-1].role == "assistant"
                 and (turn is None or turn.error is None))
    typed = st.chat_input(_invitation(services, configuration), key="message", max_chars=MOST_CHARACTERS)
    text = typed or idea
    if text and text.strip():
        if live and current is not None:
            services.turns.keep_waiting(current.id, text)
            st.rerun()
        ask(services, mine, current, configuration, text)
    if st.session_state.get(SETTINGS):
        settings_dialog(services, mine, current, configuration)


# ---- which conversation, and how it is answered --------------------------------------------------------------------


def _current(mine: Conversations) -> Conversation | None:
    """The one that the address names, or that this tab had before another page was looked at."""
    named = st.query_params.get(NAMED) or st.session_state.get(CURRENT)
    if not named:
        return None
    current = mine.find(named)
    if current is None:
        show_conversation(None)
        st.toast("That conversation is not here any more.", icon=":material/info:")
        return None
    if st.query_params.get(NAMED) != named or st.session_state.get(CURRENT) != named:
        show_conversation(current.id)
    return current


def _configuration(services: Services, current: Conversation | None) -> Configuration:
    if current is not None:
        return Configuration.from_json(current.configuration)
    draft = st.session_state.get(DRAFT)
    return draft if isinstance(draft, Configuration) else services.start


# ---- asking --------------------------------------------------------------------------------------------------------


def ask(services: Services, mine: Conversations, current: Conversation | None, configuration: Configuration, text: str
        ) -> NoReturn:
    """Adds a message, and has it answered."""
    conversation = current.id if current is not None else mine.create(text, configuration.to_json())
    mine.add(conversation, "user", [(text, Details())])
    show_conversation(conversation)
    _answer(services, mine, conversation, configuration)
    st.rerun()


def _answer(services: Services, mine: Conversations, conversation: str, configuration: Configuration,
            position: int | None = None) -> None:
    """Has the last message of a person answered; with a position, as further alternatives to what is there."""
    messages = [each for each in mine.messages(conversation) if position is None or each.position < position]
    question = Question(messages=[Said(role=each.role, content=each.content) for each in messages],
                        configuration=configuration, asker=conversation)

    def finish(outcome: Outcome) -> None:
        mine.add(conversation, "assistant", outcome, position)

    services.turns.start(conversation, question, finish)


# ---- what is seen --------------------------------------------------------------------------------------------------


def _heading(services: Services, mine: Conversations, current: Conversation | None, configuration: Configuration
             ) -> None:
    st.set_page_config(page_title=f"{current.title} \u00b7 torchchat" if current is not None else "torchchat")
    with st.container(key="heading", horizontal=True, vertical_alignment="center", wrap=False):
        with st.container(gap=None):
            st.markdown(f"#### {plain(current.title)}" if current is not None else "#### New conversation",
                        anchors=False)
            st.caption(frame.model_line(services, configuration))
        if st.button("Settings", icon=":material/tune:", key="settings", help="Model, answers and sampling",
                     wrap=False):
            st.session_state[SETTINGS] = True
        if current is not None:
            more_menu(mine, current)


def _chats(services: Services, configuration: Configuration) -> bool:
    """Whether the model was made for conversations, as far as is known."""
    if not isinstance(services.models, LocalModels):
        return True
    known = services.models.known(configuration.request(services.models.base))
    return known is None or known.chats or configuration.transcript


def _invitation(services: Services, configuration: Configuration) -> str:
    return "Write a message" if _chats(services, configuration) else "Begin a text, and the model goes on"


def _welcome(services: Services, configuration: Configuration) -> str | None:
    """What there is before the first message; the idea that was taken up."""
    chats = _chats(services, configuration)
    with st.container(key="welcome", horizontal_alignment="center"):
        st.html(f"<img alt='' src='data:image/svg+xml;base64,{frame.icon()}'>", width="content")
        st.markdown("## What shall we talk about?" if chats else "## How does the story begin?", anchors=False,
                    text_alignment="center")
        st.caption("Everything stays with the model that you chose. Enter sends, Shift+Enter begins a new line."
                   if chats else "This model continues texts: write a beginning, and it goes on. Enter sends.",
                   text_alignment="center")
        with st.container(horizontal=True, horizontal_alignment="center"):
            for number, idea in enumerate(IDEAS[chats]):
                if st.button(idea, key=f"idea-{number}"):
                    return idea
    return None


def _messages(services: Services, mine: Conversations, current: Conversation | None,
              messages: Sequence[StoredMessage], live: bool) -> None:
    turn = services.turns.at(current.id) if current is not None else None
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        if current is None or (live and last and message.role == "assistant" and turn is not None):
            continue  # it is being generated again, below
        with st.container(key=f"said-{message.role}-{message.position}"), \
                st.chat_message(message.role, avatar=frame.AVATARS[message.role]):
            if st.session_state.get(EDITED) == message.id and not live:
                _editor(services, mine, current, message)
                continue
            _message(services, mine, current, message, last, live)


def _waiting(services: Services, mine: Conversations, current: Conversation, live: bool, ready: bool) -> None:
    """A message that was written while an answer was. It is sent once that is there; where it failed, the writer
    decides."""
    text = services.turns.waiting(current.id)
    if text is None:
        return
    if live or not ready:
        with st.container(key="said-user-waiting"), st.chat_message("user", avatar=frame.AVATARS["user"]):
            frame.show_text("user", text)
            st.caption("Sent after this answer." if live else "Not sent, since there is no answer before it.")
            with st.container(horizontal=True, key="tools-waiting"):
                ready = not live and st.button("Send now", icon=":material/send:", type="tertiary", key="send-waiting")
                if st.button("Take back", icon=":material/undo:", type="tertiary", key="take-back"):
                    services.turns.take_waiting(current.id)
                    st.rerun()
    if ready and not live and (taken := services.turns.take_waiting(current.id)) is not None:
        ask(services, mine, current, Configuration.from_json(current.configuration), taken)


def _message(services: Services, mine: Conversations, current: Conversation, message: StoredMessage, last: bool,
             live: bool) -> None:
    if message.role == "user":
        with st.container(horizontal=True, wrap=False, vertical_alignment="top", key=f"words-{message.id}"):
            with st.container():
                frame.show_text("user", message.content)
            _edit_button(current, message, disabled=live)
        return
    if message.content:
        frame.show_text("assistant", message.content)
    else:
        st.caption("The model ended its answer without a word.")
    if live:
        st.caption(plain(message.details.line))
    else:
        _tools(services, mine, current, message, last)


def _edit_button(current: Conversation, message: StoredMessage, disabled: bool = False) -> None:
    kind = "message" if message.role == "user" else "answer"
    if st.button("Edit", icon=":material/edit:", type="tertiary", help=f"Edit this {kind}",
                 key=f"edit-{current.id}-{message.id}", disabled=disabled):
        st.session_state[EDITED] = message.id
        st.rerun()


def _tools(services: Services, mine: Conversations, current: Conversation, message: StoredMessage, last: bool) -> None:
    """Figures, and what can be done with an answer."""
    place = f"{current.id}-{message.id}"
    opened: set[int] = st.session_state.setdefault(OPENED, set())
    with st.container(key=f"tools-{place}", horizontal=True, gap="small"):
        if message.details.line:
            st.caption(plain(message.details.line), width="content")
        if message.content:
            frame.copy_button(place, message.content)
        has_figures = bool(message.details.table or message.details.notice)
        label = "Hide figures" if message.id in opened else "Figures"
        if has_figures and st.button(label, icon=":material/info:", type="tertiary", help="Figures of this answer",
                                     key=f"info-{place}"):
            opened ^= {message.id}
            st.rerun()
        _edit_button(current, message)
        if last:
            if st.button("Regenerate", icon=":material/refresh:", type="tertiary", key=f"again-{place}",
                         help="Answer once more; this answer is kept beside the new one", shortcut="Alt+G"):
                _answer(services, mine, current.id, Configuration.from_json(current.configuration), message.position)
                st.rerun()
            if message.alternatives > 1:
                _pager(mine, current, message)
    if message.id in opened:
        with st.container(key=f"figures-{place}", border=True):
            frame.show_details(message.details)


def _pager(mine: Conversations, current: Conversation, message: StoredMessage) -> None:
    """Goes through the answers to one question; the conversation goes on from the one that is seen."""
    place = f"{current.id}-{message.position}"
    with st.container(horizontal=True, gap=None, width="content", vertical_alignment="center", wrap=False):
        back = st.button("Before", icon=":material/chevron_left:", type="tertiary", key=f"back-{place}",
                         help="The answer before", disabled=message.place == 0)
        st.caption(f"{message.place + 1} of {message.alternatives}", width="content")
        on = st.button("Next", icon=":material/chevron_right:", type="tertiary", key=f"on-{place}",
                       help="The next answer", disabled=message.place == message.alternatives - 1)
    if back or on:
        mine.choose(current.id, message.position, message.place + (1 if on else -1))
        st.rerun()


def _editor(services: Services, mine: Conversations, current: Conversation, message: StoredMessage) -> None:
    asks = message.role == "user"
    with st.form(key=f"editor-{message.id}", border=False):
        text = st.text_area("Edit the message", value=message.content, max_chars=MOST_CHARACTERS, height="content",
                            label_visibility="collapsed", key=f"text-{message.id}")
        if asks:
            st.caption("What follows this message is replaced by a new answer.")
        with st.container(horizontal=True):
            saved = st.form_submit_button("Send" if asks else "Save", type="primary")
            left = st.form_submit_button("Cancel", shortcut="Esc")
    if left:
        st.session_state.pop(EDITED, None)
        st.rerun()
    if saved and text is not None and text.strip():
        st.session_state.pop(EDITED, None)
        if asks:
            mine.cut(current.id, message.position)
            ask(services, mine, current, Configuration.from_json(current.configuration), text)
        mine.change(current.id, message.id, text)
        st.rerun()


# ---- an answer that is being written --------------------------------------------------------------------------------


@st.fragment(run_every=frame.REFRESH)
@frame.guarded
def _live(turn: Turn) -> None:
    """Drawn again and again by itself, while the rest of the page stays."""
    if turn.done.is_set():
        st.rerun()
    samples = turn.samples
    with st.chat_message("assistant", avatar=frame.AVATARS["assistant"]):
        shown = next((sample for sample in samples if sample.text), samples[0])
        frame.show_progress(turn, shown)
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Stop", icon=":material/stop_circle:", key="stop", help="End the answer; what is there stays",
                         shortcut="Esc"):
                turn.stop()
            tokens = sum(sample.tokens for sample in samples)
            if tokens:
                done = sum(sample.details is not None for sample in samples)
                answers = f" · {done} of {len(samples)} answers complete" if len(samples) > 1 else ""
                st.caption(f"{tokens} token{'' if tokens == 1 else 's'}{answers}", width="content")


def _after(services: Services, mine: Conversations, current: Conversation, messages: Sequence[StoredMessage],
           turn: Turn | None) -> None:
    """Below the last message: what went wrong, and a way to go on where a question has no answer."""
    if turn is not None and turn.error is not None:
        frame.show_error(turn.error)
    if messages and messages[-1].role == "user" and st.session_state.get(EDITED) is None \
            and st.button("Answer" if turn is None or turn.error is None else "Try again", icon=":material/refresh:",
                          key="answer", help="Have the last message answered"):
        _answer(services, mine, current.id, Configuration.from_json(current.configuration))
        st.rerun()
