"""What core and tc-eager promise beside their speed: start, memory of loading, independence of the cache's size.

    python tools/measure_core.py

Prints one line for each figure of docs/performance.md that `compare_transformers.py` does not give.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from compare_transformers import PROMPT, our_model, shape_config

from tc_eager.executor import EagerModel

HELP = "from torchchat_core.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"


def seconds_of(*command: str, text: str = "") -> float:
    """Wall time of a whole process."""
    started = time.perf_counter()
    subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return time.perf_counter() - started


def start_times() -> None:
    """`torchchat --help`, and one answer of the embedded model, each as a process of its own."""
    bare = [seconds_of(sys.executable, "-c", "pass") for _ in range(20)]
    helps = [seconds_of(sys.executable, "-c", HELP) for _ in range(20)]
    print(f"torchchat --help: median of 20 {1000 * statistics.median(helps):.0f} ms "
          f"(python itself {1000 * statistics.median(bare):.0f} ms)")
    chats = [seconds_of(sys.executable, "-m", "torchchat_core", "chat", text="Who are you?\n") for _ in range(5)]
    torches = [seconds_of(sys.executable, "-c", "import torch") for _ in range(5)]
    print(f"torchchat chat, start to end of one answer: median of 5 {statistics.median(chats):.2f} s "
          f"(import torch alone {statistics.median(torches):.2f} s)")


def capacity() -> None:
    """Decoding at the same position with room for 512 and for 8192 tokens, in turns."""
    config = shape_config("stories110M", max_context=8192)
    model, _ = our_model(config, torch.float32, "fp32")
    rates: dict[int, list[float]] = {512: [], 8192: []}
    for _ in range(6):
        for limit, found in rates.items():
            found.append(decode_rate(model, limit))
    small, large = (statistics.median(found[1:]) for found in rates.values())
    print(f"decode at position 256, tokens/s: {small:.1f} with room for 512, {large:.1f} for 8192, "
          f"ratio {large / small:.3f}")


def decode_rate(model: EagerModel, limit: int, position: int = 256, count: int = 32) -> float:
    """Tokens per second of `count` steps after `position` tokens."""
    session = model.session(limit)
    session.prefill((PROMPT * position)[:position])
    started = time.perf_counter()
    for _ in range(count):
        session.decode(7)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    start_times()
    capacity()
