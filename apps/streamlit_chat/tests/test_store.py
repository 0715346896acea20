"""Conversations in SQLite: what is kept, whose it is, and what damaged or strange files do."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import threading
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.documents import as_json, as_markdown, file_name
from tc_streamlit_chat.figures import Details, Figures
from tc_streamlit_chat.store import Conversations, Store, shortened_title
from torchchat_core.conversation import checked_messages
from torchchat_core.errors import TorchchatError

DETAILS = Details(model="small, eager, cpu, bf16", reason="stop", figures=Figures(new_tokens=3, decode_tps=12.5))
QUOTES = "Robert'); DROP TABLE message; -- \" \\ % _"


@pytest.fixture
def mine(tmp_path: Path) -> Conversations:
    return Conversations(Store(tmp_path / "folder" / "c.sqlite3"), "")


def said(mine: Conversations, *messages: str) -> str:
    conversation = mine.create(messages[0], Configuration().to_json())
    for number, text in enumerate(messages):
        mine.add(conversation, "assistant" if number % 2 else "user", [(text, DETAILS if number % 2 else Details())])
    return conversation


def test_what_was_said_is_there_again(mine: Conversations) -> None:
    conversation = said(mine, QUOTES, "An answer\nof two lines.")
    again = Conversations(Store(mine.store.path), "")
    assert [each.title for each in again.listed()] == [QUOTES]
    assert [(each.role, each.content) for each in again.messages(conversation)] == [
        ("user", QUOTES), ("assistant", "An answer\nof two lines.")]
    assert again.messages(conversation)[1].details == DETAILS
    assert stat.S_IMODE(mine.store.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("search", "found"), [
    ("", 2), ("STRASSE", 1), ("straße", 1), ("lighthouse", 1), ("100%", 1), ("%", 1), ("_", 0), ("' OR 1=1 --", 0)])
def test_a_search_finds_titles_and_words_as_they_are_written(mine: Conversations, search: str, found: int) -> None:
    said(mine, "Wo ist die Straße?", "Dort.")
    said(mine, "A story", "The Lighthouse was 100% dark.")
    assert len(mine.listed(search)) == found


def test_nobody_reads_or_changes_what_is_another_ones(mine: Conversations) -> None:
    conversation = said(mine, "secret", "answer")
    other = Conversations(mine.store, "somebody else")
    assert other.listed() == []
    assert other.find(conversation) is None
    assert other.messages(conversation) == []
    assert other.add(conversation, "user", [("hello", Details())]) is None
    other.rename(conversation, "mine now")
    other.change(conversation, mine.messages(conversation)[0].id, "changed")
    other.cut(conversation, 0)
    other.choose(conversation, 1, 0)
    other.delete(conversation)
    assert [each.content for each in mine.messages(conversation)] == ["secret", "answer"]
    assert mine.listed()[0].title == "secret"


def test_a_conversation_goes_on_from_the_answer_that_was_chosen(mine: Conversations) -> None:
    conversation = said(mine, "question", "first")
    assert mine.add(conversation, "assistant", [("second", DETAILS), ("third", DETAILS)], 1) == 1
    last = mine.messages(conversation)[-1]
    assert (last.content, last.place, last.alternatives) == ("second", 1, 3)
    mine.choose(conversation, 1, 0)
    assert mine.messages(conversation)[-1].content == "first"
    mine.choose(conversation, 1, 7)  # there is none
    assert mine.messages(conversation)[-1].content == "first"
    mine.change(conversation, mine.messages(conversation)[-1].id, "other words")
    assert mine.messages(conversation)[-1].content == "other words"
    mine.cut(conversation, 1)
    assert [each.content for each in mine.messages(conversation)] == ["question"]


def test_an_answer_that_was_changed_by_hand_says_so(mine: Conversations) -> None:
    conversation = said(mine, "Hello", "Good morning")
    answer = mine.messages(conversation)[1]
    mine.change(conversation, answer.id, answer.content)
    assert mine.messages(conversation)[1].details == answer.details  # the same words
    mine.change(conversation, answer.id, "Good evening")
    found = mine.messages(conversation)[1]
    assert (found.content, found.details.reason, found.details.figures) == ("Good evening", "edited",
                                                                            answer.details.figures)
    assert "edited by hand" in found.details.line
    Conversations(mine.store, "another").change(conversation, answer.id, "taken")
    assert mine.messages(conversation)[1].content == "Good evening"


def test_what_is_deleted_is_gone_and_a_late_answer_is_dropped(mine: Conversations) -> None:
    conversation = said(mine, "question", "answer")
    mine.delete(conversation)
    assert mine.add(conversation, "assistant", [("late", DETAILS)]) is None
    with mine.store.opened() as connection:
        assert connection.execute("SELECT count(*) FROM message").fetchone() == (0,)


def test_many_threads_write_at_once(mine: Conversations) -> None:
    conversation = mine.create("busy", "{}")
    threads = [threading.Thread(target=lambda name=name: [  # type: ignore[misc]
        mine.add(conversation, "user", [(f"{name}-{number}", Details())]) for number in range(20)]) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mine.messages(conversation)) == 80


def test_titles_are_one_line_and_may_not_be_empty(mine: Conversations) -> None:
    assert shortened_title("a\n  b") == "a b"
    assert len(shortened_title("word " * 50)) <= 60
    conversation = said(mine, "question")
    mine.rename(conversation, "A better title")
    assert mine.listed()[0].title == "A better title"
    with pytest.raises(TorchchatError, match="title is empty"):
        mine.rename(conversation, "  ")


def test_files_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"this is no database" * 100)
    with pytest.raises(TorchchatError, match="cannot be used: file is not a database"):
        Store(damaged)
    newer = tmp_path / "newer"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(TorchchatError, match="newer torchchat"):
        Store(newer)
    with pytest.raises(TorchchatError, match="cannot be kept"):
        Store(damaged / "below" / "a file")


DAMAGE = {
    "text that is no UTF-8": ("UPDATE message SET content = CAST(x'ff41' AS TEXT)", "cannot be used"),
    "a title that is no UTF-8": ("UPDATE conversation SET title = CAST(x'ff' AS TEXT)", "cannot be used"),
    "a role of nobody": ("UPDATE message SET role = 'assi\\tant'", "is damaged: it holds a message of"),
    "bytes for a text": ("UPDATE message SET content = x'00ff'", "is damaged: it holds b.* in place of a text"),
    "text for a time": ("UPDATE conversation SET updated = 'soon'", "is damaged: it holds 'soon' in place of a number"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_reported(damage: str, mine: Conversations) -> None:
    said(mine, "question")
    statement, message = DAMAGE[damage]
    with sqlite3.connect(mine.store.path) as connection:
        connection.execute(statement)
    with pytest.raises(TorchchatError, match=message):
        [mine.messages(conversation.id) for conversation in mine.listed("question")]


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_to_the_file_raises_only_our_error(seed: int, mine: Conversations, tmp_path: Path) -> None:
    for number in range(3):
        said(mine, f"question {number} \u2603")
    mine.store.add_measurement("speed", "caf\u00e9", "<p>")
    with sqlite3.connect(mine.store.path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    random = Random(seed)
    content = bytearray(mine.store.path.read_bytes())
    for _ in range(30):
        content[random.randrange(len(content))] = random.choice((0, 128, 255))
    (tmp_path / "damaged").write_bytes(content)
    with suppress(TorchchatError):
        damaged = Conversations(Store(tmp_path / "damaged"), mine.owner)
        damaged.store.measurements()
        for conversation in damaged.listed():
            as_markdown(conversation, damaged.messages(conversation.id))


def test_measurements_are_kept_newest_first(mine: Conversations) -> None:
    first, second = (mine.store.add_measurement("speed", title, f"<p>{title}") for title in ("one", "two"))
    assert [each.title for each in mine.store.measurements()] == ["two", "one"]
    assert mine.store.page(first) == "<p>one"
    mine.store.delete_measurement(second)
    assert mine.store.page(second) is None


def test_exports_hold_all_that_was_said(mine: Conversations) -> None:
    conversation = mine.create("On: the/sea?", Configuration(system="Be kind.").to_json())
    mine.add(conversation, "user", [("Hello", Details())])
    mine.add(conversation, "assistant", [("Ahoy `there`", DETAILS)])
    found = mine.find(conversation)
    assert found is not None
    messages = mine.messages(conversation)
    text = as_markdown(found, messages)
    assert text.startswith("# On: the/sea?")
    assert "## System\n\nBe kind.\n\n## You\n\nHello\n\n## Model\n\nAhoy `there`\n\n*small, eager" in text
    content = json.loads(as_json(found, messages))
    assert [each["role"] for each in checked_messages(content["messages"])] == ["system", "user", "assistant"]
    assert content["details"][2]["figures"]["new_tokens"] == 3
    assert file_name(found, ".md") == "on-the-sea.md"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"figures": 1}', '{"figures": {"new_tokens": "many"}}', "null"])
def test_damaged_details_count_as_none(text: str) -> None:
    assert Details.from_json(text) == Details()


@pytest.mark.skipif(os.name != "posix", reason="this system has no modes of files")
def test_a_store_that_others_can_read_and_its_side_files_become_private(tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite3"
    Conversations(Store(path), "me").create("title", "{}")
    files = [path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm"))]
    with Store(path).opened() as connection:
        connection.execute("SELECT 1 FROM conversation").fetchall()
        for each in files:
            each.chmod(0o644)
        Store(path)
        assert [stat.S_IMODE(each.stat().st_mode) for each in files] == [0o600] * 3


def test_a_store_whose_mode_cannot_be_changed_is_named_in_a_warning(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "conversations.sqlite3"
    path.touch(mode=0o600)
    path.chmod(0o644)

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    Store(path)
    assert [str(path) in line and "other users can read" in line for line in caplog.messages] == [True]
