"""What all pages of the process share. The command puts it together before the first page is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.jobs import Jobs
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.remote import RemoteModels
from tc_streamlit_chat.store import Store
from tc_streamlit_chat.turns import Turns
from torchchat_core.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class Services:
    """One for the process."""

    registry: Registry
    models: LocalModels | RemoteModels
    turns: Turns
    store: Store
    jobs: Jobs
    start: Configuration  # of a new conversation
    private: bool  # only this machine's user can come here: he sees all conversations, and may name any model

    def close(self) -> None:
        self.jobs.close()
        self.turns.close()


_installed: list[Services] = []


def install(services: Services | None) -> None:
    """Makes these the ones that pages use; None: there are none any more."""
    _installed[:] = [services] if services is not None else []


def services() -> Services:
    """Raises `RuntimeError` where a page is drawn by something else than the command."""
    if not _installed:
        raise RuntimeError("the pages are drawn by `torchchat browser`, not by streamlit itself")
    return _installed[0]
