"""The script that Streamlit runs for every page and click."""

from __future__ import annotations

import streamlit as st

from tc_streamlit_chat.pages import chat, compare, measure
from tc_streamlit_chat.pages.frame import prepare

prepare()
st.navigation([
    st.Page(chat.page, title="Chat", icon=":material/chat:", url_path="chat", default=True),
    st.Page(compare.page, title="Compare", icon=":material/compare_arrows:", url_path="compare"),
    st.Page(measure.page, title="Measure", icon=":material/speed:", url_path="measure"),
], position="top").run()
