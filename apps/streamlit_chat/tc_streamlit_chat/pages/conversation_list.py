"""The conversations beside the page, and what can be done with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime
from functools import partial

import streamlit as st

from tc_streamlit_chat.documents import as_json, as_markdown, file_name
from tc_streamlit_chat.markdown import plain
from tc_streamlit_chat.pages import frame
from tc_streamlit_chat.pages.session import show_conversation
from tc_streamlit_chat.services import Services
from tc_streamlit_chat.store import Conversation, Conversations
from torchchat_core.errors import TorchchatError

LONGEST_SEARCH = 200  # characters
MENU = "more"
MENUS_CLOSED = "menus-closed"  # number of times that the page closed the menu
EXPORTS = (("Markdown", as_markdown, ".md", "text/markdown", ":material/download:"),
           ("JSON", as_json, ".json", "application/json", ":material/data_object:"))
SHOWN = 100  # conversations of the list; a search finds the others


def conversation_list(services: Services, mine: Conversations, current: Conversation | None) -> None:
    """A button for a new one, a search, and all that there are."""
    if st.button("New conversation", icon=":material/add_comment:", width="stretch", key="new", shortcut="Alt+N"):
        show_conversation(None)
        st.rerun()
    search = st.text_input("Search conversations", placeholder="Search conversations", type="search", live=True,
                           label_visibility="collapsed", key="search", icon=":material/search:") or ""
    found = mine.listed(search[:LONGEST_SEARCH])
    with st.container(key="conversations"):
        if not found:
            st.caption("No conversation has these words." if search.strip() else "Conversations will be listed here.")
        for heading, group in _by_age(found[:SHOWN]):
            st.caption(heading)
            for each in group:
                _row(services, each, current)
    if len(found) > SHOWN:
        st.caption(f"{len(found) - SHOWN} older ones: search for their words.")


def _row(services: Services, each: Conversation, current: Conversation | None) -> None:
    turn = services.turns.at(each.id)
    busy = turn is not None and not turn.done.is_set()
    chosen = current is not None and current.id == each.id
    if st.button(plain(each.title), key=f"open-{each.id}", width="stretch", wrap=False,
                 type="secondary" if chosen else "tertiary", icon=":material/pending:" if busy else None):
        show_conversation(each.id)
        st.rerun()


def _by_age(found: Sequence[Conversation]) -> Iterator[tuple[str, list[Conversation]]]:
    today = date.today()
    groups: dict[str, list[Conversation]] = {}
    for each in found:
        days = (today - datetime.fromtimestamp(each.updated).date()).days
        name = "Today" if days <= 0 else "Yesterday" if days == 1 else "This week" if days < 7 else "Earlier"
        groups.setdefault(name, []).append(each)
    yield from groups.items()


# ---- one of them ---------------------------------------------------------------------------------------------------


def more_menu(mine: Conversations, current: Conversation) -> None:
    """Show the menu that renames, exports or deletes the conversation."""
    key = f"{MENU}-{st.session_state.get(MENUS_CLOSED, 0)}"
    with st.popover("More", icon=":material/more_vert:", help="Rename, export, delete", key=key, on_change="rerun"):
        with st.form(key=f"rename-{current.id}", border=False):
            title = st.text_input("Title", value=current.title, key=f"title-{current.id}") or ""
            if st.form_submit_button("Rename", icon=":material/edit:", width="stretch",
                                     on_click=_rename, args=(mine, current)) and not title.strip():
                frame.show_error(TorchchatError("the title is empty", "give the conversation a name"))
        for name, write, suffix, kind, icon in EXPORTS:
            st.download_button(f"Export as {name}", partial(_exported, mine, current, write),
                               file_name(current, suffix), kind, icon=icon, width="stretch", on_click="ignore",
                               key=f"export{suffix.replace('.', '-')}")
        deleting = st.button("Delete\u2026", icon=":material/delete:", width="stretch", key="delete",
                             on_click=_close_menu)
    if deleting:
        _delete(mine, current)


def _exported(mine: Conversations, current: Conversation, write: Callable[..., str]) -> str:
    """Made when it is asked for: what was said then."""
    return write(mine.find(current.id) or current, mine.messages(current.id))


def _close_menu() -> None:
    """Close the menu, which would cover the dialog.

    The next rerun draws a new popover, which is closed. Setting the state of the old one to False has no effect if
    the rerun that opened it was skipped, because the browser reacts only to changes of the state.
    """
    st.session_state[MENUS_CLOSED] = st.session_state.get(MENUS_CLOSED, 0) + 1


def _rename(mine: Conversations, current: Conversation) -> None:
    title = str(st.session_state.get(f"title-{current.id}") or "")
    if title.strip():
        mine.rename(current.id, title)
        _close_menu()


@st.dialog("Delete this conversation?")
@frame.guarded
def _delete(mine: Conversations, current: Conversation) -> None:
    st.text(current.title)
    st.caption("Its messages are deleted for good.")
    with st.container(horizontal=True, horizontal_alignment="right"):
        if st.button("Keep it", key="keep"):
            st.rerun()
        if st.button("Delete", type="primary", icon=":material/delete:", key="delete-now"):
            frame.services().turns.forget(current.id)
            mine.delete(current.id)
            show_conversation(None)
            st.rerun()
