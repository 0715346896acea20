"""Decoding and prefill on a GPU, beside transformers.

    python tools/compare_cuda.py [--shape Llama-3.2-1B] [--executor compile] [--recipe linear:int4] [--json]

Every row is a model with random weights in bfloat16, quantised there where the row has a recipe: 64 tokens are decoded
after a prompt of 128 and after one of 1984; medians of three runs after one that is not counted.
Weights read are bytes of the weights a token times the rate, beside what the memory gives in the same process.
transformers decodes the same shape greedily in bfloat16, operation by operation, and with a static cache, which it
compiles itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure_compile import EXECUTORS, SHAPES, random_model

from torchchat_core.measure.bandwidth import read_speed
from torchchat_core.measure.rates import measure_rates
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.quantization.replacing import token_bytes
from torchchat_core.specs import LoadRequest

SHAPES["Llama-3.1-8B"] = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32,
                          "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
RECIPES = ("none", "linear:int8", '{"linear:int4": {"groupsize": 128}}')
PROMPT, LONG_PROMPT, NEW_TOKENS, ROUNDS = 128, 1984, 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.2-1B")
    parser.add_argument("--executor", choices=EXECUTORS, action="append", help="may be repeated; eager and compile")
    parser.add_argument("--recipe", action="append", help="may be repeated; none, linear:int8, linear:int4 in 128")
    parser.add_argument("--peer", choices=("eager", "static"), action="append", default=[],
                        help="measures transformers, too; may be repeated")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no GPU, or this build of PyTorch no CUDA")
    name, speed = torch.cuda.get_device_name(), read_speed(4 << 30, "cuda")
    print(f"{name}, PyTorch {torch.__version__}, memory read at {speed / 1e9:.0f} GB/s", file=sys.stderr)
    rows = [lambda each=each: theirs(arguments.shape, each) for each in arguments.peer]
    rows += [lambda recipe=recipe, executor=executor: ours(arguments.shape, executor, recipe)
             for recipe in arguments.recipe or RECIPES for executor in arguments.executor or EXECUTORS]
    for row in rows:
        found = {"device": name, "memory_speed": speed, **row()}
        print(json.dumps(found) if arguments.json else line(found), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def ours(shape: str, executor: str, recipe: str) -> dict[str, Any]:
    """One of our executors with one recipe."""
    with torch.device("cuda"):
        module = random_model(shape, "bf16")
    if recipe != "none":
        read_recipe(recipe, load_registry(), "cuda", "bf16").apply(module)
    size = token_bytes(module)
    started = time.perf_counter()
    model = EXECUTORS[executor]().load(LoadRequest(device="cuda", dtype="bf16", module=module))
    model.session().decode(0)
    made = time.perf_counter() - started
    short = measure_rates(model, range(100, 1100), shape, prompt_tokens=PROMPT, new_tokens=NEW_TOKENS, repeats=ROUNDS)
    long = measure_rates(model, range(100, 1100), shape, prompt_tokens=LONG_PROMPT, new_tokens=NEW_TOKENS,
                         repeats=ROUNDS)
    model.close()
    return {"shape": shape, "name": f"tc-{executor}", "recipe": recipe, "token_bytes": size, "made_s": made,
            "decode": short.decode.median, "decode_long": long.decode.median, "prefill": short.prefill.median,
            "prefill_long": long.prefill.median}


def theirs(shape: str, cache: str) -> dict[str, Any]:
    """transformers, with the cache that grows ("eager") or the one of a fixed size ("static")."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"], head_dim=sizes["head_dim"],
        num_key_value_heads=sizes["num_kv_heads"], max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=0, dtype=torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    options = {"cache_implementation": "static"} if cache == "static" else {}

    def seconds(length: int, count: int) -> float:
        prompt = torch.arange(100, 100 + length, device="cuda")[None]

        def generate() -> None:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
                           do_sample=False, **options)

        return statistics.median(timed(generate, ROUNDS))

    started = time.perf_counter()
    seconds(PROMPT, NEW_TOKENS + 1)
    made = time.perf_counter() - started
    rates = []
    for length in (PROMPT, LONG_PROMPT):
        first, whole = seconds(length, 1), seconds(length, NEW_TOKENS + 1)
        rates.append((NEW_TOKENS / (whole - first), length / first))
    return {"shape": shape, "name": f"transformers, {cache}", "recipe": "none", "token_bytes": size, "made_s": made,
            "decode": rates[0][0], "decode_long": rates[1][0], "prefill": rates[0][1], "prefill_long": rates[1][1]}


def timed(run: Callable[[], None], rounds: int) -> Iterator[float]:
    """Seconds of each round but the first."""
    for counted in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if counted:
            yield time.perf_counter() - started


def line(found: dict[str, Any]) -> str:
    read = found["decode"] * found["token_bytes"]
    return (f"{found['shape']:<13} {found['name']:<20} {found['recipe']:<34} decode {found['decode']:.1f} t/s, behind "
            f"{LONG_PROMPT} {found['decode_long']:.1f}; {read / 1e9:.0f} GB/s, {read / found['memory_speed']:.0%} of "
            f"the memory's; prefill {found['prefill']:.0f}, of {LONG_PROMPT} {found['prefill_long']:.0f} t/s; ready in "
            f"{found['made_s']:.1f} s")


if __name__ == "__main__":
    main()
