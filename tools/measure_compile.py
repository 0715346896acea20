"""Decoding speed and start of tc-compile beside tc-eager, in turns in the same process.

    python tools/measure_compile.py [--shape stories110M] [--dtype bf16] [--starts] [--json]

Models have random weights. The rate counts the tokens after a prompt of 16; prefill is of 128 tokens. With `--starts`,
the time from a new process to the first token is measured too: with eager, with compile and nothing compiled yet, and
with compile again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tc_compile.executor import CompileExecutor
from tc_eager.executor import EagerExecutor
from torchchat_core import kernels
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES, WithoutInitialValues
from torchchat_core.small_files import cache_folder
from torchchat_core.specs import LoadedModel, LoadRequest

SHAPES = {
    "stories15M": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_layers": 6, "num_heads": 6,
                   "num_kv_heads": 6, "head_dim": 48},
    "stories110M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_layers": 12,
                    "num_heads": 12, "num_kv_heads": 12, "head_dim": 64},
    "Llama-3.2-1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16,
                     "num_heads": 32, "num_kv_heads": 8, "head_dim": 64},
}
EXECUTORS = {"eager": EagerExecutor, "compile": CompileExecutor}
PROMPT, LONG_PROMPT = list(range(5, 21)), list(range(100, 228))


def random_model(shape: str, dtype: str) -> Transformer:
    """A transformer of a named shape with small random weights, made without a copy of them in float32."""
    config = ModelConfig(architecture="llama", max_context=2048, tied_embeddings=True, **SHAPES[shape])
    with torch.device("meta"), WithoutInitialValues():
        module = Transformer(config).requires_grad_(False).eval()
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=TORCH_DTYPES[dtype]).uniform_(-0.02, 0.02)
        setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(values + ("norm" in name), False))
    module.lm_head.weight = module.model.embed_tokens.weight
    module.model.rotary = type(module.model.rotary)(config).to(module.model.norm.weight.device)
    return module


def load(executor: str, shape: str, dtype: str, module: Transformer | None = None) -> LoadedModel:
    """The model, loaded by the executor."""
    module = random_model(shape, dtype) if module is None else module
    return EXECUTORS[executor]().load(LoadRequest(device="cpu", dtype=dtype, module=module))


def sharing(module: Transformer) -> Transformer:
    """A second transformer with the same weights, since executors change the layers of what they load."""
    with torch.device("meta"), WithoutInitialValues():
        other = Transformer(module.config).requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(other.get_submodule(owner), attribute, parameter)
    other.lm_head.weight = other.model.embed_tokens.weight
    other.model.rotary = module.model.rotary
    return other


def compare(shape: str, dtype: str, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Rates of both executors, in turns, after one round that is not counted."""
    torch.manual_seed(0)
    module = random_model(shape, dtype)
    weight_bytes = sum(parameter.nbytes for parameter in module.parameters())
    models = {"eager": load("eager", shape, dtype, sharing(module)), "compile": load("compile", shape, dtype, module)}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for counted in range(rounds + 1):
        for name, model in models.items():
            found = _rates(model, new_tokens)
            if counted:
                rates[name].append(found)
    result: dict[str, Any] = {"shape": shape, "dtype": dtype, "weight_bytes": weight_bytes}
    for index, kind in enumerate(("decode", "prefill")):
        series = {name: [pair[index] for pair in found] for name, found in rates.items()}
        result[kind] = {name: statistics.median(found) for name, found in series.items()}
        result[f"{kind}_ratio"] = statistics.median(
            ours / theirs for ours, theirs in zip(series["compile"], series["eager"], strict=True))
    return result


def _rates(model: LoadedModel, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of decoding, and of a prefill of 128 tokens."""
    session = model.session()
    token = int(session.prefill(PROMPT).argmax())
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = int(session.decode(token).argmax())
    decoding = time.perf_counter() - started
    session.close()
    session = model.session()
    started = time.perf_counter()
    session.prefill(LONG_PROMPT)
    prefilling = time.perf_counter() - started
    session.close()
    return new_tokens / decoding, len(LONG_PROMPT) / prefilling


def starts(shape: str, dtype: str) -> dict[str, float]:
    """Seconds from a new process to its first token; the making of random weights is left out."""
    kernels.load()  # compiled before, or now
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "torchchat"
        cache.mkdir()
        (cache / "kernels").symlink_to(cache_folder() / "kernels")
        environment = {**os.environ, "XDG_CACHE_HOME": folder,
                       "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
        return {what: _first_token(executor, shape, dtype, environment) for what, executor in
                (("eager, warming up", "eager"), ("eager", "eager"), ("compile, first", "compile"),
                 ("compile, second", "compile"), ("eager again", "eager"), ("compile, third", "compile"))}


def _first_token(executor: str, shape: str, dtype: str, environment: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--shape", shape, "--dtype", dtype, "--first-token", executor]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return time.perf_counter() - started - float(done.stdout)


def first_token(executor: str, shape: str, dtype: str) -> float:
    """Runs to the first token; the seconds that making the weights took."""
    started = time.perf_counter()
    module = random_model(shape, dtype)
    made = time.perf_counter() - started
    load(executor, shape, dtype, module).session().prefill(PROMPT)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated; stories110M")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, action="append", help="may be repeated; fp32 and bf16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--first-token", choices=EXECUTORS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes, dtypes = arguments.shape or ["stories110M"], arguments.dtype or ["fp32", "bf16"]
    if arguments.first_token:
        print(first_token(arguments.first_token, shapes[0], dtypes[0]))
        return
    for shape in shapes:
        for dtype in dtypes:
            found = compare(shape, dtype, arguments.new_tokens, arguments.rounds)
            found["starts"] = starts(shape, dtype) if arguments.starts else {}
            print(json.dumps(found) if arguments.json else _line(found), flush=True)


def _line(found: dict[str, Any]) -> str:
    decode, prefill = found["decode"], found["prefill"]
    bandwidth = decode["compile"] * found["weight_bytes"] / 1e9
    lines = [f"{found['shape']} {found['dtype']}: decode {decode['eager']:.1f} eager, {decode['compile']:.1f} compile "
             f"t/s (x {found['decode_ratio']:.2f}, {bandwidth:.1f} GB/s); prefill "
             f"{prefill['eager']:.0f}, {prefill['compile']:.0f} t/s (x {found['prefill_ratio']:.2f})"]
    return "\n".join(lines + [f"  {what}: {seconds:.2f} s to the first token"
                              for what, seconds in found["starts"].items()])


if __name__ == "__main__":
    main()
