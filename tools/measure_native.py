"""The C++ runner beside `torchchat generate` with the same exported file, both sides in turns.

    make native
    python tools/measure_native.py [--shape stories110M] [--kind int4] [--ending pt2] [--file FILE] [--anew] [--json]

Files are made once, of random weights, in torchchat's cache folder, with the tokenizer of the model that comes with
torchchat; --anew makes them again, as exporters change. --file measures another one, made by `torchchat export`. Each
run is a process of its own with as many threads as the runtime takes. Rates are tokens per second, as --json of both
sides tells them: of decoding 128 tokens, and of a prefill of some hundred tokens. The time to the first token is that
of the whole process, from its start to its end after one token. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure_compile import SHAPES, random_model

from torchchat_core.pipeline import ModelRequest, fetch_files
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import parse_recipe
from torchchat_core.small_files import cache_folder
from torchchat_core.specs import ExporterInfo, ExportRequest
from torchchat_core.text_content import text_content

ENDINGS = {"pt2": "aoti-package", "so": "aoti-dso", "pte": "executorch"}
KINDS: dict[str, dict[str, tuple[str, dict[str, Any] | None]]] = {  # dtype and recipe, by ending
    "fp32": dict.fromkeys(ENDINGS, ("fp32", None)),
    "int4": {"pt2": ("bf16", {"linear:int4": {"groupsize": 32}}), "so": ("bf16", {"linear:int4": {"groupsize": 32}}),
             "pte": ("fp32", {"linear:a8w4dq": {"groupsize": 32}})},
}
NEW_TOKENS = 128
PROMPT, LONG_PROMPT = "Once upon a time", "Once upon a time there was a plugin. " * 12
RUNNER = Path(__file__).resolve().parents[1] / "build" / "native" / "torchchat-run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated; stories110M")
    parser.add_argument("--kind", choices=KINDS, action="append", help="may be repeated; all of them")
    parser.add_argument("--ending", choices=ENDINGS, action="append", help="may be repeated; pt2 and pte")
    parser.add_argument("--file", type=Path, action="append", default=[], help="an exported file; may be repeated")
    parser.add_argument("--anew", action="store_true", help="export again what is in the cache folder")
    parser.add_argument("--runner", type=Path, default=RUNNER, help="torchchat-run; that of `make native`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.runner.is_file():
        parser.error(f"there is no {arguments.runner}; `make native` builds it")
    files = arguments.file or [
        written(shape, kind, ending, arguments.anew) for shape in arguments.shape or ["stories110M"]
        for kind in arguments.kind or KINDS for ending in arguments.ending or ["pt2", "pte"]]
    for file in files:
        found = compare(file, arguments.runner, arguments.rounds)
        print(json.dumps(found) if arguments.json else lines(found), flush=True)


def compare(file: Path, runner: Path, rounds: int) -> dict[str, Any]:
    """The figures of both sides, round by round after one that is not counted."""
    sides = {"torchchat": [sys.executable, "-m", "torchchat_core", "generate", str(file)],
             "torchchat-run": [str(runner), str(file)]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for counted in range(rounds + 1):
        for name, command in sides.items():
            figures = measured(command)
            if counted:
                found[name].append(figures)
    summary: dict[str, Any] = {"file": file.name}
    for what in ("first", "decode", "prefill"):
        series = {name: [figures[what] for figures in rows] for name, rows in found.items()}
        ratios = [ours / theirs for theirs, ours in zip(*series.values(), strict=True)]
        summary[what] = {"ratio": statistics.median(ratios),
                         **{name: [statistics.median(each), min(each), max(each)] for name, each in series.items()}}
    return summary


def measured(command: list[str]) -> dict[str, float]:
    started = time.perf_counter()
    run(command, PROMPT, 1)
    first = time.perf_counter() - started
    return {"first": first, "decode": run(command, PROMPT, NEW_TOKENS)["decode_tps"],
            "prefill": run(command, LONG_PROMPT, 1)["prefill_tps"]}


def run(command: list[str], prompt: str, new_tokens: int) -> dict[str, float]:
    """The statistics of one answer."""
    flags = ["--raw", "--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(new_tokens), "--json"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr}")
    answer = json.loads(done.stdout)
    if len(answer["token_ids"]) != new_tokens:
        raise RuntimeError(f"{' '.join(command)} gave {len(answer['token_ids'])} tokens, not {new_tokens}")
    statistics_of_it: dict[str, float] = answer["stats"]
    return statistics_of_it


def lines(found: dict[str, Any]) -> str:
    text = [found["file"]]
    for what, unit in (("first", "s"), ("decode", "tokens/s"), ("prefill", "tokens/s")):
        sides = [f"{name} {found[what][name][0]:.4g} ({found[what][name][1]:.3g}-{found[what][name][2]:.3g})"
                 for name in ("torchchat", "torchchat-run")]
        text.append(f"  {what:8} {sides[0]}, {sides[1]} {unit}: x {found[what]['ratio']:.3f}")
    return "\n".join(text)


def written(shape: str, kind: str, ending: str, anew: bool) -> Path:
    """The exported file of a random model, made where it is missing. Nothing ends an answer of it."""
    path = cache_folder() / "peers" / f"{shape}-{kind}-runner-{torch.__version__}.{ending}"
    if path.exists() and not anew:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    registry = load_registry()
    torch.manual_seed(0)
    dtype, recipe = KINDS[kind][ending]
    module = random_model(shape, dtype)
    files = fetch_files(ModelRequest(model="embedded"), registry)
    text = replace(text_content(files, registry, module.config.vocab_size), end_ids=())
    if recipe is not None:
        parse_recipe(json.dumps(recipe), registry).settle(registry, "cpu", dtype).apply(module)
    info: ExporterInfo = registry.find(ExporterInfo, ENDINGS[ending])
    info.make().export(ExportRequest(module=module, path=path, device="cpu", dtype=dtype, text=text, recipe=recipe,
                                     schemes=tuple(recipe or ()), max_seq_length=1024))
    return path


if __name__ == "__main__":
    main()
