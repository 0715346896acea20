"""Text input from files and standard input, in every encoding and with every line ending; commands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.text import measured_text
from torchchat_core.quantization.calibration import CalibrationText, read_calibration
from torchchat_core.settings import read_config
from torchchat_core.small_files import written_text
from torchchat_core.testing.models import TinyTokenizer

TEXT = "Once upon a time,\nthere was"
SAME_TEXT = {
    "line feeds": TEXT.encode(), "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "lines of Windows": TEXT.replace("\n", "\r\n").encode(), "a line end": f"{TEXT}\n".encode(),
    "lines of Windows to the end": (TEXT.replace("\n", "\r\n") + "\r\n").encode(),
    "lines of an old Mac": TEXT.replace("\n", "\r").encode(),
}
OTHER_TEXT = {
    "UTF-16 of Windows": TEXT.encode("utf-16"), "UTF-16, big end first": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-16 without a mark": TEXT.encode("utf-16-le"), "Latin-1": "Où est-il ?".encode("latin-1"),
}


@pytest.mark.parametrize("kind", SAME_TEXT)
def test_a_prompt_is_the_same_text_in_every_form(kind: str, testdata: Path, torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(SAME_TEXT[kind])
    flags = ["generate", testdata / "hf/stories260K", "--max-new-tokens", 1, "--temperature", 0, "--json"]
    for done in (torchchat(*flags, "--prompt-file", tmp_path / "prompt"), torchchat(*flags, stdin=SAME_TEXT[kind])):
        assert json.loads(done.out)["stats"]["prompt_tokens"] == 11


@pytest.mark.parametrize("kind", OTHER_TEXT)
def test_text_in_another_encoding_is_refused(kind: str, torchchat: Any, tmp_path: Path) -> None:
    content = OTHER_TEXT[kind]
    (tmp_path / "prompt").write_bytes(content)
    for done in (torchchat("generate", "--prompt-file", tmp_path / "prompt"), torchchat("generate", stdin=content),
                 torchchat("chat", stdin=b"Hi\n" + content), torchchat("chat", stdin=content)):
        assert done.code == 1
        assert "is not UTF-8 text: " in done.err
        assert "try: save it as UTF-8" in done.err


def test_the_error_says_where_the_text_is_wrong() -> None:
    with pytest.raises(TorchchatError, match=r"line 3 is not UTF-8 text: byte 1 is 0xf9"):
        written_text(OTHER_TEXT["Latin-1"], "line 3")
    with pytest.raises(TorchchatError, match="it begins with a byte order mark of UTF-16"):
        written_text(OTHER_TEXT["UTF-16 of Windows"], "the prompt")


def test_measurement_and_calibration_texts_are_the_same_in_every_encoding(tmp_path: Path) -> None:
    (tmp_path / "unix").write_bytes(b"one\ntwo\n" * 40)
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\r\n" * 40)
    assert measured_text(tmp_path / "windows").content == measured_text(tmp_path / "unix").content
    read = [read_calibration(CalibrationText(path=tmp_path / name), TinyTokenizer(), 64)
            for name in ("unix", "windows")]
    assert read[0] == read[1]


def test_settings_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b'\xef\xbb\xbfdevice = "cpu"\r\n')
    assert read_config(tmp_path / "config.toml") == {"device": "cpu"}


# ---- chat without a terminal --------------------------------------------------------------------------------------


def talk(torchchat: Any, content: bytes) -> Any:
    return torchchat("chat", "--temperature", 0, "--max-new-tokens", 3, "--json", stdin=content)


def test_a_line_is_the_same_message_in_every_form(torchchat: Any) -> None:
    answers = [[json.loads(line)["stats"]["prompt_tokens"] for line in talk(torchchat, content).out.splitlines()]
               for content in (b"Hi\nWho?\n", b"\xef\xbb\xbfHi\nWho?", b"Hi\r\nWho?\r\n")]
    assert len(answers[0]) == 2
    assert answers[1:] == answers[:1] * 2


def test_commands_work_as_on_a_terminal_and_leave_standard_output_alone(torchchat: Any, tmp_path: Path) -> None:
    script = f"/system Be brief.\nHi\n/retry\nWho?\n/undo\n/save {tmp_path}/c.json\n/help\n/EXIT\nnever read\n"
    done = talk(torchchat, script.encode())
    assert done.code == 0
    assert len([json.loads(line) for line in done.out.splitlines()]) == 3
    assert "Removed: Who?" in done.err
    assert "/retry" in done.err
    messages = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages[:2]] == ["Be brief.", "Hi"]
    assert len(messages) == 3


@pytest.mark.parametrize(("script", "message"), [
    (b"/hepl\nHi\n", "there is no command '/hepl'"), (b"/save\nHi\n", "/save needs a file"),
    (b"/set temperature hot\nHi\n", "it has to be a number"), (b"/retry\nHi\n", "there is no message yet"),
    (b'"""Hi\n\nyou\n', 'the block that begins in line 1 of standard input has no end\ntry: end it with """'),
])
def test_a_failing_command_ends_a_chat_without_a_terminal(script: bytes, message: str, torchchat: Any) -> None:
    done = talk(torchchat, script)
    assert (done.code, done.out) == (1, "")
    assert message in done.err


def test_a_block_of_lines_is_one_message(torchchat: Any) -> None:
    one = talk(torchchat, b'"""\n/bye\n\nHi"""\n')
    assert len(one.out.splitlines()) == 1
    assert json.loads(one.out)["stats"]["new_tokens"] == 3
