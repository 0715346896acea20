"""How fast a model decodes while other processes take cores: tokens per second beside 0, 1 and 2 of them.

    python tools/measure_busy.py [--shape stories110M] [--dtype bf16] [--threads 2] [--runs 4]

The weights are random. Medians of runs of 60 tokens behind a prompt of 16, by tc-eager in this process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import torch
from measure_compile import PROMPT, SHAPES, random_model

from torchchat_core.generation_options import SamplingOptions
from torchchat_core.plugins import load_registry
from torchchat_core.sampling import Sampler
from torchchat_core.specs import ExecutorInfo, LoadedModel, LoadRequest

NEW_TOKENS = 60
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="stories110M")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    request = LoadRequest(device="cpu", dtype=given.dtype, module=random_model(given.shape, given.dtype), artifact=None)
    model = load_registry().find(ExecutorInfo, "eager").make().load(request)
    decode(model)
    for others in range(3):
        with ExitStack() as stack:
            for _ in range(others):
                process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
                stack.callback(process.kill)
            rates = [decode(model) for _ in range(given.runs)]
        print(f"beside {others}: {statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}) tokens/s")


def decode(model: LoadedModel) -> float:
    """Tokens per second."""
    session, sampler = model.session(512), Sampler(SamplingOptions(temperature=0.0))
    token = sampler.choose(session.prefill(PROMPT))
    started = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = sampler.choose(session.decode(token))
    seconds = time.perf_counter() - started
    session.close()
    return NEW_TOKENS / seconds


if __name__ == "__main__":
    main()
