"""What all pages have: their look, who is there, and how errors and figures are shown."""

from __future__ import annotations

import functools
import logging
import secrets
from base64 import b64encode
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import ParamSpec

import streamlit as st

from tc_streamlit_chat.choices import AUTO, FASTEST, base_name, short_name
from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.figures import Details
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.markdown import plain, shown
from tc_streamlit_chat.services import Services
from tc_streamlit_chat.services import services as services
from tc_streamlit_chat.serving import COOKIE, COOKIE_FORM
from tc_streamlit_chat.store import Conversations
from tc_streamlit_chat.turns import Sample, Turn
from torchchat_core.errors import TorchchatError

FOLDER = Path(__file__).resolve().parent
AVATARS = {"user": ":material/person:", "assistant": ":material/smart_toy:"}
REFRESH = 0.2  # seconds between two looks at an answer that is being written
log = logging.getLogger("torchchat.browser")
Arguments = ParamSpec("Arguments")
ABOUT = "Chat with language models on your own machine, with PyTorch."


def guarded(draw: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Whatever goes wrong while a part of a page is drawn is told in its place, and in the terminal."""

    @functools.wraps(draw)
    def drawn(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        try:
            draw(*arguments, **named)
        except TorchchatError as error:
            show_error(error)
        except Exception as error:  # Streamlit's own way to end a script is none
            log.exception("a page failed")
            show_error(TorchchatError(f"{type(error).__name__}: {error}", "load the page again"))

    return drawn


def prepare() -> None:
    """The first thing that a page does."""
    icon = str(FOLDER / "icon.svg")
    st.set_page_config(page_title="torchchat", page_icon=icon, layout="centered", initial_sidebar_state="auto",
                       menu_items={"About": ABOUT})
    st.logo(icon, size="large")
    st.html(FOLDER / "style.css")
    with st.container(key="keyboard"):  # which takes no room
        st.html(f"<script>{(FOLDER / 'keyboard.js').read_text(encoding='utf-8')}</script>",
                unsafe_allow_javascript=True)


def icon() -> str:
    """The icon in base64."""
    return b64encode((FOLDER / "icon.svg").read_bytes()).decode()


def conversations(found: Services) -> Conversations:
    """Those of whoever looks at the page: of this machine's user, or of one browser among many."""
    if found.private:
        return Conversations(found.store, "")
    cookie = st.context.cookies.get(COOKIE)
    return Conversations(found.store, cookie if isinstance(cookie, str) and COOKIE_FORM.fullmatch(cookie) else tab())


def tab() -> str:
    """A name of this tab, until it is loaded anew."""
    if "tab" not in st.session_state:
        st.session_state["tab"] = secrets.token_urlsafe(24)
    return str(st.session_state["tab"])


def model_line(services: Services, configuration: Configuration) -> str:
    """What answers, in one line of Markdown."""
    name = short_name(configuration.model or base_name(services))
    if not isinstance(services.models, LocalModels):
        return f"{plain(name)} · {plain(services.models.url)}"
    known = services.models.known(configuration.request(services.models.base))
    if known is not None:
        return plain(f"{name} · {known.line}")
    request = configuration.request(services.models.base)
    how = [each for each in (request.executor, request.device, request.dtype, request.quantize)
           if each not in (AUTO, FASTEST, None)]
    return plain(" · ".join(part for part in (name, ", ".join(how), "loaded with the first question") if part))


def show_error(error: TorchchatError) -> None:
    """What happened, and what to do about it."""
    st.error(plain(error.message) + (f"  \n**Try:** {plain(error.fix)}" if error.fix else ""),
             icon=":material/error:")


def show_text(role: str, text: str) -> None:
    """A message: what a person typed as it is, what a model wrote as Markdown."""
    if role == "assistant":
        st.markdown(shown(text))
    else:
        st.text(text)


def show_progress(turn: Turn, sample: Sample) -> None:
    """One answer that is being written."""
    if sample.text:
        show_text("assistant", sample.text + (" \u258c" if sample.details is None else ""))
    elif turn.status.share is not None:
        st.progress(turn.status.share, plain(turn.status.text))
    else:
        st.caption(f":material/hourglass_empty: {plain(turn.status.text)}\u2026")


def copy_button(key: str, text: str) -> None:
    """Draw a button that copies a text; keyboard.js does it in the browser, without a rerun of the page."""
    with st.container(key=f"copied-{key}", width="content"):
        st.button("Copy", icon=":material/content_copy:", type="tertiary", help="Copy this answer", key=f"copy-{key}")
        st.html(f'<span data-copied="{escape(text)}"></span>')


def show_details(details: Details) -> None:
    """Show every figure of an answer."""
    if details.notice:
        st.caption(plain(details.notice))
    rows = [f"| {plain(name)} | {plain(value)} |" for name, value in details.table]
    if rows:
        st.markdown("\n".join([rows[0], "|---|---|", *rows[1:]]))
