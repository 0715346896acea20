"""The interactive chat: on a real terminal where that matters, else on a console that keeps what it is given."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console
from rich.markdown import Markdown

from torchchat_core.cli.answers import printable
from torchchat_core.cli.chat_commands import Leave
from torchchat_core.cli.chat_completion import ChatCompleter
from torchchat_core.cli.chat_input import block_is_open
from torchchat_core.cli.chat_session import ChatSession, Models
from torchchat_core.cli.clipboard import copy_to_clipboard
from torchchat_core.cli.markdown_stream import MarkdownStream, open_fence, split_finished
from torchchat_core.cli.terminal_chat import TerminalChat, _history
from torchchat_core.conversation import Conversation
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import TokenSequence
from torchchat_core.sources.local import EMBEDDED
from torchchat_core.testing.models import TinyTokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader


class Chat:
    """A chat whose model says one text, and what it has shown."""

    def __init__(self, session: Any, text_format: TextFormat) -> None:
        self.console = Console(file=io.StringIO(), width=100, force_terminal=False)
        self.models = {"a[b]": session}  # those that the chat can open, by name

        @contextmanager
        def open_(flags: Mapping[str, Any]) -> Iterator[Any]:
            name = flags["model"]
            if name not in self.models:
                raise TorchchatError(f"cannot load {name}")
            yield SimpleNamespace(name=name, max_seq_length=4096, text_format=text_format,
                                  executor=SimpleNamespace(name="eager"),
                                  model=SimpleNamespace(device="cpu", dtype="fp32")), TokenSequence(self.models[name])

        self.session = ChatSession({"model": "a[b]", "temperature": 0.0}, Models(self._fetch, open_, lambda: ["a[b]"]))
        self.session.__enter__()
        self.terminal = TerminalChat(self.session, self.console)

    @property
    def conversation(self) -> Conversation:
        return self.session.conversation

    def _fetch(self, flags: Mapping[str, Any]) -> None:
        if flags["model"] == "unknown":
            raise TorchchatError("there is no model 'unknown'")

    def say(self, line: str) -> str:
        self.console.file = io.StringIO()
        self.terminal.take(line)
        return str(self.console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture
def chat(scripted: Any, byte_format: TextFormat) -> Chat:
    return Chat(scripted("Fine."), byte_format)


def test_an_answer_is_shown_with_its_figures(chat: Chat) -> None:
    shown = chat.say("Hi")
    assert shown.split("\n")[0].rstrip() == "Fine."
    assert re.search(r"5 tokens · [\d.]+ tokens/s · first after", shown)
    assert "tokens/s" in chat.terminal.status()
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
    for name in ("/bye", "/exit", "/quit"):
        with pytest.raises(Leave):
            chat.say(name)


def test_help_lists_every_command(chat: Chat) -> None:
    shown = chat.say("/help")
    for name in ("/retry", "/undo", "/reset, /clear", "/model", "/copy", "/load FILE", "/bye, /exit, /quit", '"""'):
        assert name in shown
    assert all(name in shown for command in chat.terminal._commands.all for name in command.names)


@pytest.mark.parametrize("command", ["/reset", "/clear"])
def test_the_status_bar_follows_a_reset(command: str, chat: Chat) -> None:
    chat.say("Hi")
    assert "0 of 4096 tokens" not in chat.terminal.status().split(" · ")
    chat.say(command)
    assert chat.terminal.status() == " 0 of 4096 tokens · eager · fp32 · a[b]"
    assert chat.say("/stats") == "There is no answer yet.\n"


def test_undo_removes_the_last_turn_and_keeps_the_cache_of_earlier_turns(chat: Chat) -> None:
    chat.say("/system S")
    chat.say("First?")
    first = list(chat.conversation.messages)
    chat.say("Second?")
    assert chat.say("/undo") == "Removed: Second?\n3 messages left.\n"
    assert chat.conversation.messages == first
    assert chat.terminal.status().startswith(f" {chat.conversation.prompt_length()} of 4096 tokens")
    chat.say("Third?")
    assert chat.session.last is not None
    encode = chat.session.opened.text_format.tokenizer.encode
    new = encode("Third?</s><|turn|>assistant: ", special=True)  # "</s><|turn|>user: " is in the cache already
    assert chat.session.last.prefilled_tokens == len(new)
    chat.say("/undo")
    chat.say("/undo")
    assert "there is no message yet" in chat.say("/undo")
    assert chat.conversation.system == "S"


def test_retry_answers_the_last_message_again(scripted: Any, byte_format: TextFormat) -> None:
    session = scripted("One.")
    session._script += [*TinyTokenizer().encode("Two."), 1]
    chat = Chat(session, byte_format)
    chat.say("Hi")
    shown = chat.say("/retry")
    assert "Two." in shown
    assert "temperature is 0" in shown
    assert chat.conversation.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Two."}]
    assert chat.session.last is not None
    assert chat.session.last.prefilled_tokens == 1  # the rest of the prompt is in the cache


def test_retry_draws_other_random_numbers_with_the_same_seed(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []
    ask = Conversation.ask

    def noted(*arguments: Any, stream: int, **options: Any) -> Any:
        streams.append(stream)
        return ask(*arguments, stream=stream, **options)

    monkeypatch.setattr(Conversation, "ask", noted)
    for line in ("Hi", "/retry", "/retry", "And?"):
        chat.say(line)
    assert streams == [0, 1, 2, 0]


def test_a_retry_that_fails_keeps_the_old_answer(chat: Chat) -> None:
    assert "there is no message yet" in chat.say("/retry")
    chat.say("Hi")
    before = list(chat.conversation.messages)
    chat.session._changed["logit_bias"] = {999_999: 1.0}
    assert "error: logit_bias names token 999999" in chat.say("/retry")
    assert chat.conversation.messages == before


def test_another_model_continues_the_conversation(chat: Chat, scripted: Any) -> None:
    chat.models["big"] = scripted("Large.")
    chat.say("Hi")
    chat.say("/set temperature 0.25")
    shown = chat.say("/model big")
    assert shown.startswith("big on cpu, fp32, eager.\nThe conversation is kept (2 messages)")
    assert chat.terminal.status().endswith(" big")
    assert chat.session.options.sampling.temperature == 0.25
    chat.say("And?")
    assert [message["content"] for message in chat.conversation.messages] == ["Hi", "Fine.", "And?", "Large."]
    assert "big on cpu" in chat.say("/model")


@pytest.mark.parametrize("reason", [KeyboardInterrupt, MemoryError])
def test_interrupted_loading_keeps_the_old_model(reason: type[BaseException], chat: Chat) -> None:
    open_ = chat.session.models.open

    def interrupted(flags: Mapping[str, Any]) -> Any:
        if flags["model"] == "big":
            raise reason
        return open_(flags)

    chat.session.models = Models(chat._fetch, interrupted, list)
    chat.say("Hi")
    with pytest.raises(reason):
        chat.session.switch("big")
    assert "Fine." in chat.say("And?")
    assert len(chat.conversation.messages) == 4


@pytest.mark.parametrize("name", ["unknown", "damaged"])
def test_a_model_that_cannot_be_opened_keeps_the_old_one(name: str, chat: Chat) -> None:
    chat.say("Hi")
    assert name in chat.say(f"/model {name}")
    assert "Fine." in chat.say("And?")
    assert len(chat.conversation.messages) == 4


def test_another_model_has_files_of_its_own(chat: Chat) -> None:
    chat.session._flags |= {"gguf_path": "x.gguf", "adapter": "lora", "device": "cpu"}
    opened: list[Mapping[str, Any]] = []
    open_ = chat.session.models.open
    chat.session.models = Models(chat._fetch, lambda flags: (opened.append(flags), open_(flags))[1], list)
    chat.say("/model a[b]")
    assert (opened[0]["gguf_path"], opened[0]["adapter"], opened[0]["device"]) == (None, None, "cpu")


def test_a_file_is_overwritten_only_on_request(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text("precious")
    assert "already exists" in chat.say(f"/save {file}")
    assert file.read_text() == "precious"
    assert "0 messages written" in chat.say(f"/save --overwrite {file}")
    assert "messages" in file.read_text()


def test_a_block_is_one_message_and_never_a_command(chat: Chat) -> None:
    chat.say('"""\n/bye\n\nfor now\n"""')
    assert chat.conversation.messages[0]["content"] == "/bye\n\nfor now"
    assert chat.say('/system """Be\nbrief."""') == "Be\nbrief.\n"


@pytest.mark.parametrize("message", ["/etc/hosts is empty, why?", "// is a comment", "/no_think Hi"])
def test_a_slash_before_other_than_a_word_is_a_message(message: str, chat: Chat) -> None:
    assert "Fine." in chat.say(message)
    assert chat.conversation.messages[0]["content"] == message


@pytest.mark.parametrize(("text", "is_open"), [
    ('"""', True), ('"""a', True), ('"""a\nb"""', False), ('""""""', False), ('/system """a', True), ('a """', False),
    ("/set x", False),
])
def test_a_block_is_open_until_its_quotation_marks(text: str, is_open: bool) -> None:
    assert block_is_open(text) == is_open


def completions(chat: Chat, line: str) -> list[str]:
    completer = ChatCompleter(chat.terminal._commands.all, lambda: ["qwen3-0.6b", "qwen3-4b", "smollm2-135m"])
    return [found.text for found in completer.get_completions(Document(line), CompleteEvent())]


def test_commands_and_their_arguments_are_completed(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "story.json").touch()
    assert completions(chat, "/s") == ["/system", "/set", "/save", "/stats"]
    assert completions(chat, "/set top") == ["top_k", "top_p"]
    assert completions(chat, "/set top_k ") == []
    assert completions(chat, "/model qwen3-4") == ["qwen3-4b"]
    assert completions(chat, f"/save {tmp_path}/st") == completions(chat, f"/load {tmp_path}/st") == ["ory.json"]
    assert completions(chat, f"/save --overwrite {tmp_path}/st") == ["ory.json"]
    assert completions(chat, "a /s") == completions(chat, "/nosuch x") == completions(chat, "/stats x") == []


@pytest.fixture
def no_clipboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME", "TMUX", "SSH_CONNECTION", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("no_clipboard")
def test_copy_says_what_happened_to_the_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no answer to copy yet" in chat.say("/copy")
    chat.say("Hi")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert "there is no clipboard" in chat.say("/copy")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert "(OSC 52). Some terminals ignore this" in chat.say("/copy")
    assert terminal.getvalue() == "\x1b]52;c;RmluZS4=\x07"


@pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")
@pytest.mark.usefixtures("no_clipboard")
def test_copy_uses_a_program_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (("xclip", "exit 1"), ("xsel", f"cat > {tmp_path}/copied")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("DISPLAY", ":0")
    assert copy_to_clipboard("é", None) == "Copied to the clipboard."
    assert (tmp_path / "copied").read_text(encoding="utf-8") == "é"
    monkeypatch.setenv("SSH_TTY", "/dev/pts/0")
    with pytest.raises(TorchchatError, match="there is no clipboard"):  # that of the other machine is of no use
        copy_to_clipboard("é", None)


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


class Screen:
    """A terminal that interprets the escape sequences that rich uses; it keeps rows that scrolled out."""

    def __init__(self, height: int) -> None:
        self.rows, self._height, self._row = [""], height, 0

    def feed(self, text: str) -> list[str]:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
            if part == "\n":
                self._row += 1
                self.rows += [""] * (self._row + 1 - len(self.rows))
            elif part == "\x1b[1A":
                self._row = max(self._row - 1, len(self.rows) - self._height, 0)
            elif part == "\x1b[2K":
                self.rows[self._row] = ""
            elif not part.startswith(("\x1b", "\r")):
                self.rows[self._row] += part
        return [row.rstrip() for row in self.rows if row.strip()]


@pytest.mark.parametrize("height", [6, 40])
def test_a_paragraph_of_any_height_is_on_the_terminal_once(height: int) -> None:
    words = [f"word{number}" for number in range(100)]
    console = Console(file=io.StringIO(), width=30, height=height, force_terminal=True, color_system=None)
    with MarkdownStream(console) as output:
        output.write("First.\n\n")
        for word in words:
            output.write(f"{word} ")
    rows = Screen(height).feed(console.file.getvalue())  # type: ignore[attr-defined]
    assert " ".join(rows).split() == ["First.", *words]


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
    process.expect("For real answers: torchchat chat qwen3-0.6b")
    process.expect(">")
    process.sendintr()
    process.expect("To leave, press Ctrl-D or type /bye.")
    process.expect(">")
    process.send("Tell me a story about a dog.\r")
    process.expect("!!!!!!!!")
    process.sendintr()
    process.expect("interrupted")
    assert "^C" not in process.before  # an echo would move what is redrawn, and leave it there twice
    process.send("/stats\r")
    process.expect("peak memory")
    process.expect(">")
    process.sendeof()
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0
    assert "Tell me a story" in (tmp_path / "torchchat/history").read_text()


@pytest.mark.skipif(os.name != "posix", reason="this system has no modes of files")
def test_a_history_that_others_could_read_becomes_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = tmp_path / "torchchat" / "history"
    history.parent.mkdir()
    history.touch()
    history.chmod(0o644)
    _history()
    assert history.stat().st_mode & 0o777 == 0o600
