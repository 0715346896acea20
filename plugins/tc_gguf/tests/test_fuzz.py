"""Damaged and hostile GGUF files: 2000 seeded mutations give errors that people can read, and nothing else.

The cases run in a process of their own, whose memory is limited to four times the file beyond what it had before:

    python test_fuzz.py SEED CASES FILE ...
"""

from __future__ import annotations

import json
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError

CASES = 2000
SECONDS = 20  # for one case, on a machine that is busy with other things
SLACK = 24 << 20  # what Python, its allocator and torch's operations take, whatever the file
EDGES = (0, 1, 2, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


# ---- what is done with a file: add a reader here ------------------------------------------------------------------


def read_weights(path: Path) -> None:
    """Opens the model and reads every tensor, as stored and as bfloat16."""
    import torch

    from tc_gguf.checkpoint import GgufCheckpoint
    from tc_gguf.file import read_split

    checkpoint = GgufCheckpoint(read_split([path]))
    assert checkpoint.dtype.is_floating_point
    for name in checkpoint.names():
        checkpoint.packed(name)
        checkpoint.tensor(name)
        checkpoint.tensor(name, torch.bfloat16)


def read_tokenizer(path: Path) -> None:
    """Reads the vocabulary and goes to ids and back."""
    from tc_gguf.reader import GgufTokenizerReader

    reader = GgufTokenizerReader()
    if reader.accepts(path):
        tokenizer = reader.read(path, {})
        tokenizer.decode(tokenizer.encode("Once upon a time"))


READERS: tuple[Callable[[Path], Any], ...] = (read_weights, read_tokenizer)


# ---- mutations ----------------------------------------------------------------------------------------------------


def mutated(raw: bytes, seed: int) -> bytes:
    """The file with one to three wounds, most of them where counts, lengths, types and offsets stand."""
    chance = random.Random(seed)
    wounded = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice((flip, flip, overwrite, overwrite, truncate, swap, insert))(wounded, chance)
    return bytes(wounded)


def place(wounded: bytearray, chance: random.Random) -> int:
    """Mostly in the metadata before the vocabulary, or among the tensors' descriptions after it."""
    names = wounded.find(b"output_norm.weight"), wounded.find(b"token_embd.weight"), wounded.find(b"blk.0.")
    found = [name for name in names if name >= 0]
    tables = min(found) if found else 0
    start, length = chance.choice(((0, 1024), (0, 1024), (tables, 1536), (tables, 1536), (0, len(wounded))))
    return min(start + chance.randrange(max(length, 1)), max(len(wounded) - 1, 0))


def flip(wounded: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8))):
        if wounded:
            wounded[place(wounded, chance)] ^= 1 << chance.randrange(8)


def overwrite(wounded: bytearray, chance: random.Random) -> None:
    """A number at the edge of what is possible, at the places where numbers stand or anywhere."""
    at = chance.choice((8, 16, *(place(wounded, chance) for _ in range(8))))
    number = chance.choice((*EDGES, len(wounded), len(wounded) // 8, chance.randrange(64)))
    raw = struct.pack("<Q", number)[: chance.choice((4, 8))]
    wounded[at : at + len(raw)] = raw


def truncate(wounded: bytearray, chance: random.Random) -> None:
    del wounded[chance.choice((place(wounded, chance), len(wounded) - 1 - chance.randrange(64))) :]


def swap(wounded: bytearray, chance: random.Random) -> None:
    first, second = sorted((place(wounded, chance), place(wounded, chance)))
    length = min(chance.choice((4, 8, 24, 100)), second - first)
    wounded[first : first + length], wounded[second : second + length] = (
        wounded[second : second + length], wounded[first : first + length])


def insert(wounded: bytearray, chance: random.Random) -> None:
    """A section twice, or bytes of no meaning."""
    at, length = place(wounded, chance), chance.choice((1, 8, 32, 200))
    wounded[at:at] = wounded[at : at + length] if chance.random() < 0.5 else chance.randbytes(length)


# ---- the process that reads them ----------------------------------------------------------------------------------


class Hangs(BaseException):
    pass


def main(seed: int, cases: int, paths: list[Path]) -> None:
    import torch

    torch.set_num_threads(1)  # others use the machine too
    originals = [path.read_bytes() for path in paths]
    for path in paths:
        for reader in READERS:
            reader(path)  # imports and threads, before memory is limited
    signal.signal(signal.SIGALRM, _hangs)
    opened, faults = 0, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for case in range(cases):
            raw = mutated(originals[case % len(originals)], seed + case)
            path.write_bytes(raw)
            for reader in READERS:
                fault = _fault(reader, path, len(raw))
                opened += fault is None
                if fault:
                    faults.append(f"{paths[case % len(paths)].name}, seed {seed + case}, {reader.__name__}: {fault}")
    print(json.dumps({"cases": cases * len(READERS), "opened": opened, "faults": faults}))  # noqa: T201


def _hangs(*_: object) -> None:
    raise Hangs


def _fault(reader: Callable[[Path], Any], path: Path, size: int) -> str | None:
    """What went wrong, "" for an error as it should be, None where the file was read."""
    with _limited_memory(4 * size + SLACK):
        signal.alarm(SECONDS)
        try:
            reader(path)
        except TorchchatError as error:
            return "" if error.message and len(str(error)) < 2000 else "a message that is empty or endless"
        except Hangs:
            return f"still running after {SECONDS} s"
        except BaseException as error:
            return f"{type(error).__name__}: {error!s:.300}"
        finally:
            signal.alarm(0)
    return None


class _limited_memory:  # noqa: N801
    """Lets the process map so many more bytes, beyond the file itself, which is mapped too."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __enter__(self) -> None:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + self.more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


# ---- the tests ----------------------------------------------------------------------------------------------------


def outcome(seed: int, cases: int, paths: list[Path]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, str(seed), str(cases), *map(str, paths)], capture_output=True,
                          text=True, timeout=500, check=False)
    assert done.returncode == 0, f"the reading process ended with {done.returncode}:\n{done.stderr[-3000:]}"
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.fixture
def files(tmp_path: Path, tiny_gguf: bytes) -> list[Path]:
    """A small file that is made here, and the real ones where they are."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf)
    real = Path(__file__).resolve().parents[4] / "shared" / "testdata" / "gguf"
    return [path, path, path, *sorted(real.glob("TinyStories-*.gguf")), *sorted(real.glob("synth256-Q*.gguf"))]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_damaged_files_give_readable_errors_without_hanging_or_filling_memory(files: list[Path]) -> None:
    figures = outcome(20250, CASES, files)
    assert figures["faults"] == []
    assert 0 < figures["opened"] < 0.6 * figures["cases"]  # wounds that do not matter, and wounds that do


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_the_memory_limit_of_this_test_is_felt(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(100))

    program = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fuzz, pathlib; "
               f"print(test_fuzz._fault(lambda path: bytes(1 << 28), pathlib.Path({str(path)!r}), 100))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "MemoryError" in done.stdout


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
