"""The interactive chat: on a real terminal where that matters, else on a console that keeps what it is given."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.markdown import Markdown

from torchchat_core.cli.answers import printable
from torchchat_core.cli.markdown_stream import MarkdownStream, open_fence, split_finished
from torchchat_core.cli.terminal_chat import Leave, TerminalChat
from torchchat_core.conversation import Conversation
from torchchat_core.generation import TokenSequence
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.sources.local import EMBEDDED
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader

GREEDY = GenerationOptions(sampling=SamplingOptions(temperature=0.0))


class Chat:
    """A chat whose model says one text, and what it has shown."""

    def __init__(self, session: Any, text_format: TextFormat) -> None:
        self.console = Console(file=io.StringIO(), width=100, force_terminal=False)
        self.conversation = Conversation(TokenSequence(session), text_format)
        opened = SimpleNamespace(name="a[b]", max_seq_length=4096, text_format=text_format,
                                 executor=SimpleNamespace(name="eager"),
                                 model=SimpleNamespace(device="cpu", dtype="fp32"))
        self.terminal = TerminalChat(opened, self.conversation, GREEDY, self.console)  # type: ignore[arg-type]

    def say(self, line: str) -> str:
        self.console.file = io.StringIO()
        self.terminal.take(line)
        return self.console.file.getvalue()


@pytest.fixture
def chat(scripted: Any, byte_format: TextFormat) -> Chat:
    return Chat(scripted("Fine."), byte_format)


def test_an_answer_is_shown_with_its_figures(chat: Chat) -> None:
    shown = chat.say("Hi")
    assert shown.split("\n")[0].rstrip() == "Fine."
    assert re.search(r"5 tokens · [\d.]+ tokens/s · first after", shown)
    assert "tokens/s" in chat.terminal._status()
    assert re.search(r"decode +[\d.]+ tokens/s", chat.say("/stats"))


def test_commands_change_what_they_say(chat: Chat, tmp_path: Path) -> None:
    assert "There is no system message" in chat.say("/system")
    assert chat.say("/system Be brief.") == "Be brief.\n"
    assert "There is no system message" in chat.say("/system -")
    chat.say("Hi")
    assert "2 messages written" in chat.say(f"/save {tmp_path}/c.json")
    chat.say("/reset")
    assert chat.conversation.messages == []
    assert "2 messages read" in chat.say(f"/load {tmp_path}/c.json")
    assert re.search(r"temperature +0\.25 ", chat.say("/set temperature 0.25"))
    assert re.search(r"seed +7 ", chat.say("/set seed 7"))
    assert re.search(r"seed +None ", chat.say("/set seed none"))
    assert "/load FILE" in chat.say("/help")
    with pytest.raises(Leave):
        chat.say("/bye")


@pytest.mark.parametrize(("line", "message"), [
    ("/hepl", "there is no command '/hepl'\ntry: did you mean /help?"), ("/set temperature hot", "has to be a number"),
    ("/set temperature nan", "temperature is nan; it has to be 0 to 100"), ("/set heat 1", "there is no option 'heat'"),
    ("/save", "/save needs a file"), ("/load /nonexistent/x", "cannot be read"),
    ("/save ~nobody-here/x", "home folder"), ("/save a\0b", "cannot write"),
])
def test_errors_are_shown_and_the_chat_goes_on(line: str, message: str, chat: Chat) -> None:
    assert message in chat.say(line)
    assert "Fine." in chat.say("Hi")


def test_a_fault_of_the_program_does_not_end_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.conversation, "ask", lambda *_, **__: 1 / 0)
    assert "error: ZeroDivisionError" in chat.say("Hi")


def stream(text: str, size: int, height: int = 50) -> str:
    """What stays on a terminal that is no terminal: settled blocks alone."""
    console = Console(file=io.StringIO(), width=60, height=height, force_terminal=False)
    with MarkdownStream(console) as output:
        for at in range(0, len(text), size):
            output.write(text[at : at + size])
    return str(console.file.getvalue())  # type: ignore[attr-defined]


MARKDOWN = {
    "paragraphs": "First.\n\nSecond *one*.\n\nThird.",
    "backticks": "Look:\n\n```python\na = 1\n\n# no heading\nb = 2\n```\n\nDone.",
    "tildes": "Look:\n\n~~~\na\n\n# no heading\n~~~\n\nDone.",
    "four backticks": "Look:\n\n````\n```\n\n# no heading\n```\n````\n\nDone.",
    "table": "| a | b |\n|---|---|\n| 1 | 2 |\n\nDone.",
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("kind", MARKDOWN)
def test_streamed_markdown_looks_like_the_whole(kind: str, size: int) -> None:
    whole = Console(file=io.StringIO(), width=60, force_terminal=False)
    whole.print(Markdown(MARKDOWN[kind]))
    expected = whole.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in expected.splitlines()]
    assert [line.rstrip() for line in stream(MARKDOWN[kind], size).splitlines()] == lines


def test_a_list_is_not_cut_while_it_may_go_on() -> None:
    assert split_finished("- a\n\n- b\n\n") == ("", "- a\n\n- b\n\n")
    assert split_finished("- a\n\nText") == ("- a\n\n", "Text")


def test_fences_end_only_with_their_own_kind() -> None:
    assert open_fence("```python\na") == "```python"
    assert open_fence("```\na\n```") is None
    assert open_fence("~~~\n```") == "~~~"
    assert open_fence("````\n```") == "````"


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x9b\x07é😀") == "a[2Jb\tc\ndé😀"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_real_terminal_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    import pexpect

    environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path),
                   "TORCHCHAT_CONFIG": str(tmp_path / "config.toml"), "PROMPT_TOOLKIT_NO_CPR": "1"}
    tokenizer = HuggingFaceReader().read(EMBEDDED / "tokenizer.json", {})
    mark = tokenizer.encode("a!")[-1]
    flags = ["-m", "torchchat_core", "chat", "--logit-bias", f"{mark}=9999"]  # says "!" until it is stopped
    process = pexpect.spawn(sys.executable, flags, encoding="utf-8", dimensions=(30, 120), timeout=60, env=environment)
    process.expect("on cpu")
    process.expect(">")
    process.send("Tell me a story about a dog.\r")
    process.expect("!!!!!!!!")
    process.sendintr()
    process.expect("interrupted")
    process.send("/stats\r")
    process.expect("peak memory")
    process.expect(">")
    process.sendeof()
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0
    assert "Tell me a story" in (tmp_path / "torchchat/history").read_text()
