"""What loading a quantised folder takes beside quantising the model again: `torchchat quantize` against its result.

    python tools/measure_saved.py [--shape stories110M] [--scheme linear:int4 linear:int8] [--runs 3]

For each scheme a model of random weights is written as a folder and quantised to a second one. Then, each in a process
of its own and in turns: the first folder is opened, quantised and packed for the kernels, and the second one is opened
and packed. What both do before (importing PyTorch, compiling and loading the kernels) is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.weights import weight_shapes
from torchchat_core.pipeline import ModelRequest, quantise_model
from torchchat_core.plugins import load_registry

SHAPES = {
    "stories15M": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_layers": 6, "num_heads": 6,
                   "num_kv_heads": 6, "head_dim": 48},
    "stories110M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_layers": 12,
                    "num_heads": 12, "num_kv_heads": 12, "head_dim": 64},
}
OPEN = """
import json, sys, time
import torch
from torchchat_core import kernels
from torchchat_core.models.weights import build_model
from torchchat_core.pipeline import ModelRequest, fetch_files, open_checkpoint
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import read_recipe
from torchchat_core.quantization.running import prepare

folder, scheme, dtype = sys.argv[1], sys.argv[2], torch.bfloat16
kernels.load()
registry = load_registry()
recipe = read_recipe(scheme, registry, "cpu", "bf16") if scheme else None
request = ModelRequest(model=folder)
files = fetch_files(request, registry)
started = time.perf_counter()
model = build_model(open_checkpoint(request, files, registry), dtype)
opened = time.perf_counter()
if recipe is not None:
    recipe.apply(model)
quantised = time.perf_counter()
prepare(model, dtype)
packed = time.perf_counter()
print(json.dumps({"open": opened - started, "quantise": quantised - opened, "pack": packed - quantised,
                  "all": packed - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="stories110M", help="default: %(default)s")
    parser.add_argument("--scheme", nargs="+", default=["linear:int4", "linear:int8"], help="default: both")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    registry = load_registry()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        write_model(plain, arguments.shape)
        print(f"{arguments.shape}, bf16, {torch.get_num_threads()} threads; medians of {arguments.runs}")
        for scheme in arguments.scheme:
            small = Path(folder) / scheme.replace(":", "-")
            quantise_model(ModelRequest(model=str(plain), quantize=scheme, device="cpu"), small, registry)
            measure(plain, small, scheme, arguments.runs)


def write_model(folder: Path, shape: str) -> None:
    """A folder in Hugging Face's layout, with a tokenizer's file that nobody reads."""
    from safetensors.torch import save_file

    sizes = SHAPES[shape]
    folder.mkdir()
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
               "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "vocab_size": sizes["vocab_size"],
               "hidden_size": sizes["hidden_size"], "intermediate_size": sizes["intermediate_size"],
               "num_hidden_layers": sizes["num_layers"], "num_attention_heads": sizes["num_heads"],
               "num_key_value_heads": sizes["num_kv_heads"], "head_dim": sizes["head_dim"]}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    config = ModelConfig(architecture="llama", max_context=2048, tied_embeddings=True, **sizes)
    torch.manual_seed(0)
    save_file({name: (torch.randn(wanted) * 0.02).bfloat16() for name, wanted in weight_shapes(config).items()},
              folder / "model.safetensors", {"format": "pt"})


def measure(plain: Path, small: Path, scheme: str, runs: int) -> None:
    run(small, "")  # its pages are in the cache from now on
    pairs = [(run(plain, scheme), run(small, "")) for _ in range(runs)]
    ratio = statistics.median(first["all"] / second["all"] for first, second in pairs)
    print(f"{scheme}: quantising {parts(pairs, 0)}; loading {parts(pairs, 1)}; ratio {ratio:.1f}")


def parts(pairs: list[tuple[dict[str, float], dict[str, float]]], which: int) -> str:
    medians = {name: statistics.median(pair[which][name] for pair in pairs) for name in pairs[0][which]}
    return f"{medians.pop('all'):.3f} s ({', '.join(f'{name} {value:.3f}' for name, value in medians.items())})"


def run(folder: Path, scheme: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder), scheme], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


if __name__ == "__main__":
    main()
