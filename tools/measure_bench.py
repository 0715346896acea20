"""Holds the decoding rate of `torchchat bench` against a loop of its own, in turns.

    python tools/measure_bench.py [MODEL] [--rounds 15] [--new-tokens 64]

Both sides run in one process on the same loaded model, one run of each in turn, so that a busy machine slows both.
Printed are the medians, and the median of the ratios of the rounds; status 1 where that is off by more than 5 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from torchchat_core.measure.rates import measure_rates
from torchchat_core.pipeline import ModelRequest, OpenedModel, open_model
from torchchat_core.plugins import load_registry

PROMPT, TOLERANCE = 128, 0.05


def loop_rate(opened: OpenedModel, prompt: list[int], new_tokens: int) -> float:
    """Tokens per second of greedy decoding, written down without `measure_rates`."""
    session = opened.model.session()
    logits = session.prefill(prompt)
    seconds = 0.0
    for _ in range(new_tokens):
        token = int(logits.argmax())
        started = time.perf_counter()
        logits = session.decode(token)
        seconds += time.perf_counter() - started
    session.close()
    return new_tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--executor", default="auto")
    chosen = parser.parse_args()
    request = ModelRequest(model=chosen.model, device="cpu", dtype=chosen.dtype, executor=chosen.executor)
    with open_model(request, load_registry()) as opened:
        ids = opened.text_format.tokenizer.encode("Once upon a time there was a keeper of a light. " * 40)
        ours, theirs = [], []
        for _ in range(chosen.rounds):
            rates = measure_rates(opened.model, ids, opened.name, prompt_tokens=PROMPT, new_tokens=chosen.new_tokens,
                                  repeats=1)
            ours.append(rates.decode.median)
            theirs.append(loop_rate(opened, ids[:PROMPT], chosen.new_tokens))
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    print(f"bench {statistics.median(ours):.1f} tokens/s, loop {statistics.median(theirs):.1f}, ratio {ratio:.3f}")
    sys.exit(int(abs(ratio - 1) > TOLERANCE))


if __name__ == "__main__":
    main()
