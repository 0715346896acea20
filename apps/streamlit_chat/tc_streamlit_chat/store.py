"""Conversations in SQLite: one file, opened anew for every operation, so that any thread may use it.

A message may have alternatives (several answers to one question, or what it was generated again as), of which one is
chosen; conversations go on from that one.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tc_streamlit_chat.figures import Details
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.small_files import make_private

VERSION = 1
ROLES = ("user", "assistant")
WORDS = {int: "whole number", float: "number", str: "text"}
OTHER_FILE = "name another file with --conversations"
TITLE_LENGTH = 60
SIDE_FILES = ("-wal", "-shm", "-journal")  # files that SQLite writes next to the database, with the same content
SCHEMA = """
CREATE TABLE conversation (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, configuration TEXT NOT NULL,
    created REAL NOT NULL, updated REAL NOT NULL);
CREATE INDEX conversation_by_owner ON conversation (owner, updated);
CREATE TABLE message (
    id INTEGER PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
    position INTEGER NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL, chosen INTEGER NOT NULL,
    details TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX message_by_place ON message (conversation, position);
CREATE TABLE measurement (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, page TEXT NOT NULL, created REAL NOT NULL);
"""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row of the list."""

    id: str
    title: str
    configuration: str  # JSON, see `Configuration`
    created: float  # seconds since 1970
    updated: float


@dataclass(frozen=True, kw_only=True)
class StoredMessage:
    """The chosen one of the messages at a place, and how many there are."""

    id: int
    position: int
    role: str  # "user" or "assistant"
    content: str
    details: Details
    created: float
    place: int = 0  # of the chosen one, among
    alternatives: int = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A page of figures that was made here."""

    id: int
    kind: str
    title: str
    created: float


def default_path() -> Path:
    """Where conversations are kept unless the user says otherwise."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "torchchat" / "conversations.sqlite3"


class Store:
    """The file. Raises `TorchchatError` where it cannot be read or written, or is of a newer torchchat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600, exist_ok=True)  # what was said is nobody else's business
            make_private(path, *(path.with_name(path.name + ending) for ending in SIDE_FILES))
        except OSError as error:
            raise TorchchatError(f"conversations cannot be kept in {quoted_path(str(path))}: {error.strerror or error}",
                                 "name another file with --conversations") from None
        with self.opened() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise TorchchatError(f"{quoted_path(str(path))} was written by a newer torchchat (version {version} "
                                     "of its form; "
                                     f"this one knows {VERSION})", "update tc-streamlit-chat")
            if version == 0:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """A connection, within a transaction."""
        try:
            connection = sqlite3.connect(self.path, timeout=20)
            try:
                connection.execute("PRAGMA foreign_keys = ON")
                connection.create_function("folded", 1, lambda text: str(text).casefold(), deterministic=True)
                with connection:
                    yield connection
            finally:
                connection.close()
        except (sqlite3.Error, UnicodeError) as error:  # UnicodeError: a damaged text or table name
            raise TorchchatError(f"conversations in {quoted_path(str(self.path))} cannot be used: {error}",
                                 OTHER_FILE) from error

    def checked(self, row: Sequence[Any], *kinds: type) -> Sequence[Any]:
        """Return the row. Raises `TorchchatError` if its values do not have these types, as in a damaged file."""
        for value, kind in zip(row, kinds, strict=True):
            if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
                raise TorchchatError(f"the file of conversations {quoted_path(str(self.path))} is damaged: it holds "
                                     f"{quoted(value)} in place of a {WORDS[kind]}", OTHER_FILE)
        return row

    # ---- measurements, which belong to the machine -----------------------------------------------------------------

    def add_measurement(self, kind: str, title: str, page: str) -> int:
        with self.opened() as connection:
            found = connection.execute("INSERT INTO measurement (kind, title, page, created) VALUES (?, ?, ?, ?)",
                                       (kind, title, page, time.time()))
            return int(found.lastrowid or 0)

    def measurements(self) -> list[Measurement]:
        """Newest first."""
        with self.opened() as connection:
            rows = connection.execute("SELECT id, kind, title, created FROM measurement ORDER BY id DESC").fetchall()
        checked = [self.checked(row, int, str, str, float) for row in rows]
        return [Measurement(id=row[0], kind=row[1], title=row[2], created=row[3]) for row in checked]

    def page(self, measurement: int) -> str | None:
        with self.opened() as connection:
            row = connection.execute("SELECT page FROM measurement WHERE id = ?", (measurement,)).fetchone()
        return None if row is None else str(row[0])

    def delete_measurement(self, measurement: int) -> None:
        with self.opened() as connection:
            connection.execute("DELETE FROM measurement WHERE id = ?", (measurement,))


@dataclass(frozen=True)
class Conversations:
    """Those of one owner: nobody reads or changes another one's, whatever id he gives."""

    store: Store
    owner: str

    def listed(self, search: str = "") -> list[Conversation]:
        """Most recently used first; with a search, those that have it in their title or in a message."""
        words = search.strip().casefold()
        with self.store.opened() as connection:
            rows = connection.execute(
                "SELECT id, title, configuration, created, updated FROM conversation WHERE owner = ? AND (? = '' "
                "OR instr(folded(title), ?) OR EXISTS (SELECT 1 FROM message WHERE conversation = conversation.id "
                "AND instr(folded(content), ?))) ORDER BY updated DESC", (self.owner, words, words, words)).fetchall()
        return [_conversation(self.store, row) for row in rows]

    def find(self, conversation: str) -> Conversation | None:
        with self.store.opened() as connection:
            row = connection.execute("SELECT id, title, configuration, created, updated FROM conversation "
                                     "WHERE id = ? AND owner = ?", (conversation, self.owner)).fetchone()
        return None if row is None else _conversation(self.store, row)

    def create(self, title: str, configuration: str) -> str:
        """The id of a new conversation, which nobody can guess."""
        found, now = secrets.token_urlsafe(12), time.time()
        with self.store.opened() as connection:
            connection.execute("INSERT INTO conversation VALUES (?, ?, ?, ?, ?, ?)",
                               (found, self.owner, shortened_title(title), configuration, now, now))
        return found

    def rename(self, conversation: str, title: str) -> None:
        """Raises `TorchchatError` for an empty title."""
        if not title.strip():
            raise TorchchatError("the title is empty", "give the conversation a name")
        self._change("UPDATE conversation SET title = ? WHERE id = ? AND owner = ?",
                     (shortened_title(title), conversation, self.owner))

    def configure(self, conversation: str, configuration: str) -> None:
        self._change("UPDATE conversation SET configuration = ? WHERE id = ? AND owner = ?",
                     (configuration, conversation, self.owner))

    def delete(self, conversation: str) -> None:
        self._change("DELETE FROM conversation WHERE id = ? AND owner = ?", (conversation, self.owner))

    def messages(self, conversation: str) -> list[StoredMessage]:
        """The chosen ones, in order."""
        with self.store.opened() as connection:
            rows = connection.execute(
                "SELECT message.id, position, role, content, details, message.created, chosen FROM message "
                "JOIN conversation ON conversation.id = message.conversation WHERE conversation.id = ? AND owner = ? "
                "ORDER BY position, message.id", (conversation, self.owner)).fetchall()
        places: dict[int, list[Any]] = {}
        for row in rows:
            self.store.checked(row, int, int, str, str, str, float, int)
            if row[2] not in ROLES:
                raise TorchchatError(f"the file of conversations {quoted_path(str(self.store.path))} is damaged: it "
                                     "holds a "
                                     f"message of {quoted(row[2])}", OTHER_FILE)
            places.setdefault(row[1], []).append(row)
        return [_message(alternatives) for alternatives in places.values()]

    def add(self, conversation: str, role: str, contents: Sequence[tuple[str, Details]], position: int | None = None,
            ) -> int | None:
        """Adds one message with its alternatives, of which the first new one is chosen; its position.

        With a position, they become further alternatives there. None where the conversation is gone.
        """
        now = time.time()
        with self.store.opened() as connection:
            if not self._touch(connection, conversation, now):
                return None
            if position is None:
                position = connection.execute("SELECT coalesce(max(position) + 1, 0) FROM message WHERE conversation "
                                              "= ?", (conversation,)).fetchone()[0]
            connection.execute("UPDATE message SET chosen = 0 WHERE conversation = ? AND position = ?",
                               (conversation, position))
            connection.executemany(
                "INSERT INTO message (conversation, position, role, content, chosen, details, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(conversation, position, role, content, int(place == 0), json.dumps(asdict(details)), now)
                 for place, (content, details) in enumerate(contents)])
        return position

    def choose(self, conversation: str, position: int, place: int) -> None:
        """Goes on from another one of the alternatives."""
        with self.store.opened() as connection:
            if self._touch(connection, conversation):
                ids = [row[0] for row in connection.execute("SELECT id FROM message WHERE conversation = ? AND "
                                                            "position = ? ORDER BY id", (conversation, position))]
                if 0 <= place < len(ids):
                    connection.execute("UPDATE message SET chosen = (id = ?) WHERE conversation = ? AND position = ?",
                                       (ids[place], conversation, position))

    def change(self, conversation: str, message: int, content: str) -> None:
        """Other words for a message. Its figures stay those of the answer that it was."""
        with self.store.opened() as connection:
            row = connection.execute("SELECT details FROM message WHERE id = ? AND conversation = ? AND content <> ?",
                                     (message, conversation, content)).fetchone()
            if row is not None and self._touch(connection, conversation):
                details = replace(Details.from_json(row[0]), reason="edited")
                connection.execute("UPDATE message SET content = ?, details = ? WHERE id = ?",
                                   (content, json.dumps(asdict(details)), message))

    def cut(self, conversation: str, position: int) -> None:
        """Takes away the message at that position, and all after it."""
        with self.store.opened() as connection:
            if self._touch(connection, conversation):
                connection.execute("DELETE FROM message WHERE conversation = ? AND position >= ?",
                                   (conversation, position))

    def _change(self, statement: str, values: Sequence[Any]) -> None:
        with self.store.opened() as connection:
            connection.execute(statement, values)

    def _touch(self, connection: sqlite3.Connection, conversation: str, now: float | None = None) -> bool:
        """Whether the conversation is there, and this owner's."""
        found = connection.execute("UPDATE conversation SET updated = ? WHERE id = ? AND owner = ?",
                                   (time.time() if now is None else now, conversation, self.owner))
        return found.rowcount == 1


def shortened_title(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return (line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "\u2026") or "Untitled"


def _conversation(store: Store, row: Sequence[Any]) -> Conversation:
    store.checked(row, str, str, str, float, float)
    return Conversation(id=row[0], title=row[1], configuration=row[2], created=row[3], updated=row[4])


def _message(alternatives: Sequence[Any]) -> StoredMessage:
    place = next((place for place, row in enumerate(alternatives) if row[6]), 0)
    row = alternatives[place]
    return StoredMessage(id=row[0], position=row[1], role=row[2], content=row[3], details=Details.from_json(row[4]),
                         created=row[5], place=place, alternatives=len(alternatives))
