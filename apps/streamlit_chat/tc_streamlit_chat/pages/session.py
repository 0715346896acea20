"""What a tab remembers while it is open."""

from __future__ import annotations

import streamlit as st

CURRENT = "conversation"  # the one that is shown
DRAFT = "draft"  # the configuration of the next conversation
EDITED = "edited"  # the message whose words are being changed
OPENED = "opened"  # ids of the answers whose figures are shown
SETTINGS = "settings_open"  # whether the settings are seen
NAMED = "c"  # of the address: the conversation, so that it is found again when the page is loaded anew


def show_conversation(conversation: str | None) -> None:
    """Makes it the one of this tab; None: a new one."""
    st.session_state[CURRENT] = conversation
    st.session_state.pop(EDITED, None)
    if conversation is None:
        st.query_params.pop(NAMED, None)
    elif st.query_params.get(NAMED) != conversation:
        st.query_params[NAMED] = conversation
