"""What several tests need beside the fixtures of torchchat_core.testing."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.cli.main import main
from torchchat_core.errors import TorchchatError
from torchchat_core.testing.models import TinyTokenizer
from torchchat_core.text_format import TextFormat

TESTDATA = Path(__file__).resolve().parents[2] / "shared" / "testdata"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones last: wheels, environments, a gigabyte of weights."""
    items.sort(key=lambda item: "packaging" in item.path.parts or item.path.stem == "test_loading_memory")


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The folder of real models and golden results, which is not part of the repository."""
    if not TESTDATA.is_dir():
        pytest.skip("the test data beside the repository (../shared/testdata) is absent")
    return TESTDATA


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices are computed sooner by one thread where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the level that `--debug` sets for the whole process."""
    log = logging.getLogger("torchchat")
    level = log.level
    yield
    log.setLevel(level)


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left: its exit status, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def torchchat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process, with bytes or a stream as its standard input."""

    def run(*arguments: object, stdin: bytes | TextIO = b"") -> Outcome:
        stream = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8") if isinstance(stdin, bytes) else stdin
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@dataclass(frozen=True)
class Start:
    """The cost of starting `torchchat ARGUMENT`, and the modules that it imported."""

    share: float                # function calls, relative to importing click and pluggy and listing the distributions
    modules: frozenset[str]


BARE = "import click, pluggy, importlib.metadata; list(importlib.metadata.distributions())\n"
STARTED = ("from torchchat_core.cli.main import main\n"
           "try: main([{argument!r}])\n"
           "except SystemExit: pass\n")
COUNTED = """import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
{program}sys.setprofile(None)
print(); print(*sys.modules); print(calls)
"""


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., Start]:
    """Start the command line in a process of its own, and what any such program has to import in another one, and count
    the calls of functions: the count is the same on every machine, however busy. The second run of each counts, which
    has bytecode at hand."""
    plain = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    plain.pop("PYTHONDONTWRITEBYTECODE", None)

    def counted(program: str, environment: dict[str, str]) -> tuple[int, frozenset[str]]:
        for _ in range(2):
            lines = subprocess.run([sys.executable, "-c", COUNTED.format(program=program)], capture_output=True,
                                   text=True, check=True, env=environment).stdout.splitlines()
        return int(lines[-1]), frozenset(lines[-2].split())

    def run(argument: str, **changes: str) -> Start:
        bare, _ = counted(BARE, plain)
        ours, modules = counted(STARTED.format(argument=argument), plain | changes)
        return Start(ours / bare, modules)

    return run


STRANGE = (None, 0, -1, 2, 1.5, float("nan"), float("inf"), 10**400, 1e308, "", "x" * 1000, "\ud83d", True, [], [1],
           ["a"], [[]], {}, {"a": 1})


@pytest.fixture
def with_strange_values() -> Callable[[Any], Iterator[Any]]:
    """Yield copies of a JSON value in which one value, at any depth, is missing or has another type or range."""

    def changed(content: Any) -> Iterator[Any]:
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in list(entries):
            inner = changed(value) if isinstance(value, dict | list) else ()
            for other in (*STRANGE, *inner):
                copied = content.copy()
                copied[key] = other
                yield copied
            copied = content.copy()
            del copied[key]
            yield copied

    return changed


@pytest.fixture
def message_of() -> Callable[[Callable[[], object]], str]:
    """Return the message of the `TorchchatError` that a call raises, or "" if it raises none."""

    def message(call: Callable[[], object]) -> str:
        try:
            call()
        except TorchchatError as error:
            return error.message
        return ""

    return message


TURNS = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}</s>{% endfor %}" \
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"


@pytest.fixture
def byte_format() -> TextFormat:
    """Text as bytes, with a chat template."""
    template = ChatTemplate(TURNS, bos_token="<s>", eos_token="</s>")
    return TextFormat(TinyTokenizer(), template, frozenset({1}), {})


class ScriptedSession:
    """A session without a model: says `script` token by token, and keeps count of what it is given."""

    def __init__(self, script: Sequence[int], limit: int = 4096) -> None:
        self.limit = limit
        self.length = 0
        self.prefilled: list[int] = []  # sizes of prefills
        self._script = list(script)
        self._said = 0

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        self.prefilled.append(len(tokens))
        self.length += len(tokens)
        return self._next()

    def decode(self, token: int) -> torch.Tensor:
        self.length += 1
        return self._next()

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def close(self) -> None:
        self.length = 0

    def _next(self) -> torch.Tensor:
        logits = torch.zeros(TinyTokenizer.vocab_size)
        logits[self._script[self._said % len(self._script)]] = 10.0
        self._said += 1
        return logits


@pytest.fixture
def scripted() -> Callable[..., ScriptedSession]:
    """Makes a session that says a text, then </s>, again and again."""
    return lambda text, limit=4096: ScriptedSession([*TinyTokenizer().encode(text), 1], limit)
