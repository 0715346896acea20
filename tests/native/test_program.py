"""`torchchat-run` as a program: its command line, its ends, and a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_native
import pytest
from build_native import NATIVE, missing, run
from test_runner import run as started

from torchchat_core.archive import ArchiveWriter

HUGE = "9" * 40


@pytest.mark.parametrize(("arguments", "said"), [
    (("--prompt", "x"), "no FILE"), (("a", "b"), "two files"), (("a", "--", "--chat"), "two files"),
    (("a", "--sead", "1"), "no option --sead"), (("a", "--seed"), "needs a value"),
    (("a", "--seed", "one"), "needs a whole number, not 'one'"), (("a", "--top-k", "1.5"), "needs a whole number"),
    (("a", "--temperature", ""), "needs a number, not ''"), (("a", "--temperature", "1,5"), "not '1,5'"),
    (("a", "--json=yes"), "--json takes no value"),
    (("a", "--prompt", "x", "--chat"), "exclude"), (("a", "--threads", "0"), "1 or more"),
])
def test_wrong_usage_ends_with_status_2(arguments: tuple[str, ...], said: str, native: Path) -> None:
    done = started(native / "torchchat-run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "try: torchchat-run --help" in done.stderr


@pytest.mark.parametrize(("flag", "value", "said"), [
    ("--temperature", "-1", "temperature is -1; it has to be 0 to 100"),
    ("--temperature", "1e999", "temperature is inf"), ("--temperature", "nan", "temperature is nan"),
    ("--top-p", "0", "top_p is 0; it has to be above 0, at most 1"), ("--min-p", "1.5", "min_p is 1.5"),
    ("--repetition-penalty", "0", "repetition_penalty is 0; it has to be 0.01 to 100"),
    ("--top-k", "-1", "top_k is -1; it has to be 0 or more"), ("--top-k", HUGE, f"--top-k is {HUGE}"),
    ("--seed", "-1", "--seed is -1; it has to be 0 to 18446744073709551615"), ("--seed", HUGE, f"--seed is {HUGE}"),
    ("--max-new-tokens", "0", "max_new_tokens is 0; it has to be 1 or more"),
    ("--max-new-tokens", "-" + HUGE, f"--max-new-tokens is -{HUGE}"), ("--threads", HUGE, f"--threads is {HUGE}"),
    ("--threads", "5000", "threads is 5000"), ("--stop", "", "a stop string is empty"),
])
def test_a_value_out_of_range_is_told_before_a_model_is_loaded(flag: str, value: str, said: str, native: Path) -> None:
    done = started(native / "torchchat-run", "absent.pte", "--prompt", "x", flag, value)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {said}")


def test_help_and_version_need_no_file(native: Path) -> None:
    assert started(native / "torchchat-run", "--help").stdout.startswith("usage: torchchat-run FILE")
    assert "runtimes: aoti" in started(native / "torchchat-run", "--version").stdout


def test_a_missing_file_and_a_folder_are_refused(native: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pte", tmp_path):
        done = started(native / "torchchat-run", path, "--prompt", "x")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("arguments", [("--prompt", b"\xff"), ("--prompt", "x", "--system", b"\xed\xa0\x80"), ()])
def test_text_that_is_no_utf8_is_refused(arguments: tuple[bytes | str, ...], runner: Path,
                                         embedded: Callable[[str], Path]) -> None:
    done = subprocess.run([runner, embedded("pte"), *arguments], input=b"\xc3", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"is not UTF-8 text" in done.stderr


@pytest.mark.parametrize("content", [b"Hi\nWh\xf9 not?\n", "Hi\nWho?\n".encode("utf-16"), b"H\x00i\x00\n\x00"])
def test_a_chat_refuses_lines_that_are_not_utf8(content: bytes, runner: Path, embedded: Callable[[str], Path]) -> None:
    done = subprocess.run([runner, embedded("pte"), "--chat", "--max-new-tokens", "3"], input=content,
                          capture_output=True, check=False)
    assert done.returncode == 1
    assert b" of standard input is not UTF-8 text" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--chat",)])
def test_text_with_windows_line_endings_is_the_same(flags: tuple[str, ...], runner: Path,
                                                    embedded: Callable[[str], Path]) -> None:
    asked = [runner, embedded("pte"), "--json", "--temperature", "0", "--max-new-tokens", "3", *flags]
    lines = [subprocess.run(asked, input=content, capture_output=True, check=True).stdout.splitlines()
             for content in (b"Hi\nWho?\n", b"\xef\xbb\xbfHi\r\nWho?\r\n")]
    counts = [[json.loads(line)["stats"]["prompt_tokens"] for line in answers] for answers in lines]
    assert counts[0] == counts[1]
    assert len(counts[0]) == (2 if flags else 1)


def with_runtime(source: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a copy of an exported file to `path`, in which `runtime` of the manifest is changed."""
    with zipfile.ZipFile(source) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    manifest = next(name for name in entries if name.endswith("torchchat/manifest.json"))
    content = json.loads(entries[manifest])
    change(content["runtime"])
    path.touch()
    with ArchiveWriter(path) as writer:
        for name, data in {**entries, manifest: json.dumps(content).encode()}.items():
            writer.add(name, (data,), len(data))
    return path


@pytest.mark.parametrize("change", [lambda weights: weights.pop(), lambda weights: weights.append(weights[0])],
                         ids=["fewer", "more"])
def test_a_program_that_takes_another_number_of_weights_is_refused(
        change: Callable[[list[str]], object], runner: Path, embedded: Callable[[str], Path],
        tmp_path: Path) -> None:
    path = with_runtime(embedded("pt2"), tmp_path / "m.pt2",
                        lambda runtime: change(runtime["programs"]["any"]["weights"]))
    done = started(runner, path, "--prompt", "x", "--max-new-tokens", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"error: the file cannot be run: its program 'any' takes \d+ inputs, but the file has \d+ weights "
                     r"for it, which makes \d+ inputs\n", done.stderr)


def test_a_kv_cache_that_does_not_fit_in_memory_is_an_error(runner: Path, embedded: Callable[[str], Path],
                                                            tmp_path: Path) -> None:
    path = with_runtime(embedded("pt2"), tmp_path / "m.pt2",
                        lambda runtime: runtime["cache"].update(kv_heads=100_000, head_dim=100_000))
    done = started(runner, path, "--prompt", "x", "--max-new-tokens", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the KV cache cannot have room for 256 tokens" in done.stderr
    assert "Exception raised from" not in done.stderr


@pytest.mark.parametrize("flags", [(), ("--raw",)])
def test_a_prompt_longer_than_the_context_is_refused(flags: tuple[str, ...], runner: Path,
                                                     embedded: Callable[[str], Path]) -> None:
    done = started(runner, embedded("pte"), *flags, stdin="word " * 20_000)
    assert (done.returncode, done.stdout) == (1, "")
    assert "with an answer it has to fit into 1024" in done.stderr


def test_an_empty_prompt_is_answered_or_refused_as_by_python(runner: Path, embedded: Callable[[str], Path],
                                                             torchchat: Callable[..., Any]) -> None:
    for flags in ((), ("--raw",)):
        asked = ("--prompt", "", "--temperature", "0", "--max-new-tokens", "5", *flags)
        expected, found = torchchat("generate", embedded("pte"), *asked), started(runner, embedded("pte"), *asked)
        assert (found.returncode, found.stdout) == (expected.code, expected.out)


def test_a_reader_that_is_full_ends_it_with_status_1(runner: Path, embedded: Callable[[str], Path]) -> None:
    for flags in (("--json",), ()):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run([runner, embedded("pte"), "--prompt", "x", "--max-new-tokens", "3", *flags],
                                  stdout=full, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 1
        assert b"error: the answer cannot be written" in done.stderr


def test_a_runtime_that_is_not_there_is_named(native: Path, embedded: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("torchchat-run", *(path.name for path in native.glob("libtorchchat.*"))):
        (tmp_path / name).write_bytes((native / name).read_bytes())
    (tmp_path / "torchchat-run").chmod(0o755)
    done = subprocess.run([tmp_path / "torchchat-run", embedded("pte"), "--prompt", "x"], capture_output=True,
                          text=True, env={**os.environ, "LD_PRELOAD": str(tmp_path / "libtorchchat.so")}, check=False)
    assert done.returncode == 1
    assert "the runtime executorch cannot be loaded" in done.stderr


# ---- on a terminal ------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(runner: Path, embedded: Callable[[str], Path]) -> Callable[..., Any]:
    if sys.platform == "win32":
        pytest.skip("there is no pseudo-terminal")
    pexpect = pytest.importorskip("pexpect")
    # Drawn at random, so that an answer does not end before it is interrupted: an end token is one of thousands.
    endless = ["--temperature", "100", "--seed", "1"]
    return lambda *flags: pexpect.spawn(str(runner), [str(embedded("pte")), *endless, *flags], encoding="utf-8",
                                        codec_errors="replace", timeout=60, echo=False)


def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(terminal: Callable[..., Any]) -> None:
    chat = terminal("--chat")
    chat.expect("Ctrl-C ends an answer")
    chat.expect("> ")
    chat.sendintr()  # with nothing to end: the line begins anew
    chat.expect("\n> ")
    chat.sendline("Tell me a story.")
    chat.expect(r"\w")
    chat.sendintr()
    chat.expect(r"\d+ tokens.* interrupted\s+> ")
    chat.sendline("/reset")
    chat.expect("The conversation is empty.\\s+> ")
    chat.sendline("/bye")
    chat.expect_exact(chat.delimiter)
    chat.close()
    assert chat.exitstatus == 0


def test_ctrl_c_ends_one_answer_with_status_130(terminal: Callable[..., Any]) -> None:
    one = terminal("--prompt", "Tell me a story.", "--max-new-tokens", "900")
    one.expect(r"\w")
    one.sendintr()
    one.expect("interrupted")
    one.expect_exact(one.delimiter)
    one.close()
    assert one.exitstatus == 130


# ---- building and installing --------------------------------------------------------------------------------------


def test_an_application_finds_what_was_installed(native: Path, embedded: Callable[[str], Path], tmp_path: Path) -> None:
    prefix, example = tmp_path / "prefix", tmp_path / "example"
    run("cmake", "--install", native, "--prefix", prefix)
    run("cmake", "-S", NATIVE / "examples", "-B", example, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", example)
    done = started(example / "chat", embedded("pte"), stdin="Hi\nWhat is a plugin?\n")
    assert (done.returncode, done.stdout.count(" tokens)\n")) == (0, 2), done.stderr
    installed = started(prefix / "bin" / "torchchat-run", embedded("pte"), "--prompt", "x", "--max-new-tokens", "2")
    assert installed.returncode == 0, installed.stderr


@pytest.mark.parametrize(("setting", "said"), [
    ("CMAKE_IGNORE_PATH=/usr/include;/usr/local/include", "apt-get install"),
    ("TORCH_ROOT=/nowhere", "TORCHCHAT_AOTI=OFF does without"),
])
def test_a_library_that_is_missing_is_named_when_it_is_built(setting: str, said: str, tmp_path: Path) -> None:
    absent = missing()
    if absent is not None:
        pytest.skip(str(absent).replace("\n", "; "))
    done = subprocess.run(["cmake", "-S", NATIVE, "-B", tmp_path, f"-D{setting}",
                           "-DPython3_EXECUTABLE=/nowhere/python3"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())


def test_a_missing_debian_package_is_named_before_cmake_runs(monkeypatch: pytest.MonkeyPatch,
                                                             capfd: pytest.CaptureFixture[str]) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and c++; try: apt-get install cmake g++")
    monkeypatch.setattr("build_native.LIBRARIES", {"string.h": "libc6-dev", "nowhere/none.h": "libnone-dev"})
    monkeypatch.setattr("sys.argv", ["build_native.py"])
    assert build_native.main() == 1
    found = capfd.readouterr()
    assert (found.out, found.err) == ("", "error: the C++ runner cannot be built without nowhere/none.h\n"
                                          "try: apt-get install libnone-dev\n")


def test_a_missing_command_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert missing() == build_native.Missing(("cmake", "c++"), ("cmake", "g++"))
