"""A conversation as a file to take along."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.store import Conversation, StoredMessage

NAMES = {"user": "You", "assistant": "Model"}


def as_markdown(conversation: Conversation, messages: Sequence[StoredMessage]) -> str:
    """For people."""
    configuration = Configuration.from_json(conversation.configuration)
    parts = [f"# {conversation.title}", f"*{_time(conversation.created)}*"]
    if configuration.system.strip():
        parts += ["## System", configuration.system]
    for each in messages:
        parts += [f"## {NAMES[each.role]}", each.content]
        line = " · ".join(text for text in (each.details.model, each.details.line) if text)
        if line:
            parts.append(f"*{line}*")
    return "\n\n".join(parts) + "\n"


def as_json(conversation: Conversation, messages: Sequence[StoredMessage]) -> str:
    """For programs: `messages` is what `/load` of `torchchat chat` reads, `details` has the figures of each."""
    configuration = Configuration.from_json(conversation.configuration)
    system = [{"role": "system", "content": configuration.system}] if configuration.system.strip() else []
    content = {
        "title": conversation.title, "created": _time(conversation.created), "updated": _time(conversation.updated),
        "configuration": json.loads(configuration.to_json()),
        "messages": [*system, *({"role": each.role, "content": each.content} for each in messages)],
        "details": [*([None] if system else []),
                    *(asdict(each.details) if each.role == "assistant" else None for each in messages)],
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def file_name(conversation: Conversation, suffix: str) -> str:
    """Of its title, with nothing in it that a file system minds."""
    stem = re.sub(r"[^\w-]+", "-", conversation.title, flags=re.ASCII).strip("-").lower()
    return f"{stem or 'conversation'}{suffix}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
