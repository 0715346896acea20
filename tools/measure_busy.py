"""Measure decode and prefill, in tokens per second, while 0, 1 and 2 other processes use a core each.

    python tools/measure_busy.py [--shape stories110M | --model MODEL] [--dtype bf16] [--threads 2] [--runs 4]
                                 [--prompt 128]

The weights of a shape are random. Prints medians of runs that decode 60 tokens after a prompt of 16, and of prefill of
`--prompt` tokens, with tc-eager in this process. Compare figures within one run, or alternate runs of two checkouts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from measure_compile import PROMPT, SHAPES, random_model

from torchchat_core.generation_options import SamplingOptions
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry
from torchchat_core.sampling import Sampler
from torchchat_core.specs import ExecutorInfo, LoadedModel, LoadRequest

NEW_TOKENS = 60
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="stories110M")
    parser.add_argument("--model", help="a model instead of a shape, as for torchchat generate")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with ExitStack() as stack:
        model = stack.enter_context(loaded(given))
        decode(model), prefill(model, given.prompt)
        for others in range(3):
            with busy_processes(others):
                decoded = [decode(model) for _ in range(given.runs)]
                read = [prefill(model, given.prompt) for _ in range(given.runs)]
            print(f"{others} other processes: decode {spread(decoded)}, prefill of {given.prompt} {spread(read)} "
                  "tokens/s")


@contextmanager
def loaded(given: argparse.Namespace) -> Iterator[LoadedModel]:
    """Load the model that the arguments name."""
    registry = load_registry()
    if given.model is not None:
        with open_model(ModelRequest(model=given.model, executor="eager", device="cpu"), registry) as opened:
            yield opened.model
        return
    request = LoadRequest(device="cpu", dtype=given.dtype, module=random_model(given.shape, given.dtype), artifact=None)
    yield registry.find(ExecutorInfo, "eager").make().load(request)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` processes that use a core each."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        yield


def spread(rates: list[float]) -> str:
    """Return the median, minimum and maximum as text."""
    return f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


def prefill(model: LoadedModel, count: int) -> float:
    """Return the tokens per second of one prefill."""
    session = model.session(None)
    tokens = [5 + index % 100 for index in range(count)]
    started = time.perf_counter()
    session.prefill(tokens)
    seconds = time.perf_counter() - started
    session.close()
    return count / seconds


def decode(model: LoadedModel) -> float:
    """Tokens per second."""
    session, sampler = model.session(None), Sampler(SamplingOptions(temperature=0.0))
    token = sampler.choose(session.prefill(PROMPT))
    started = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = sampler.choose(session.decode(token))
    seconds = time.perf_counter() - started
    session.close()
    return NEW_TOKENS / seconds


if __name__ == "__main__":
    main()
