"""What tc-gguf promises beside correctness: the speed and the memory of loading a large quantised file.

    python tools/measure_gguf.py [--type Q8_0] [--gigabytes 1] [--folder DIR]

Writes a file of random weights in the shape of Llama 3.2 1B (128 256 tokens; as many layers as the size takes), loads
it as bfloat16, and prints the speed beside that of only reading the file into memory, from the page cache and from the
disk: each in a process of its own, in turns. Both get their memory from the system, which on virtual machines takes
longer than all the rest, and loading keeps nearly twice as much of it. With `--keep-quantized`, for the types that are
run as they are, the same for layers that stay as the file has them, packed for the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128_256, 2048, 8192, 32, 8, 64
SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of float16 in a block
LAYER = {
    "attn_q.weight": (HEADS * HEAD_DIM, HIDDEN), "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate.weight": (INTERMEDIATE, HIDDEN), "ffn_up.weight": (INTERMEDIATE, HIDDEN),
    "ffn_down.weight": (HIDDEN, INTERMEDIATE),
}
LOAD = """
import json, sys, time
from pathlib import Path
import torch
from tc_gguf.checkpoint import GgufSource
from torchchat_core import kernels
from torchchat_core.memory import peak_rss_bytes
from torchchat_core.models.weights import build_model
from torchchat_core.quantization.keeping import keep_quantised
from torchchat_core.quantization.running import prepare
from torchchat_core.specs import ModelFiles, ModelRef

path = Path(sys.argv[1])
ref = ModelRef(text=str(path), scheme="file", location=str(path))
kernels.load()
before, started = peak_rss_bytes(), time.perf_counter()
checkpoint = GgufSource().open(ModelFiles(ref=ref, format="gguf", root=path.parent, weights=(path,)))
if sys.argv[2] == "kept":
    checkpoint = keep_quantised(checkpoint, path.name)
model = build_model(checkpoint, torch.bfloat16)
prepare(model, torch.bfloat16)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "before": before, "peak": peak_rss_bytes(),
                  "kept": sum(tensor.nbytes for name, tensor in (*model.named_parameters(), *model.named_buffers())
                              if not name.endswith("embed_tokens.blocks"))}))  # those stay in the file
"""
READ = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
content = Path(sys.argv[1]).read_bytes()
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=SCALES, default="Q8_0", help="of all matrices (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the file, about (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the file is written for a while (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--keep-quantized", action="store_true", help="load the layers as the file has them")
    arguments = parser.parse_args()
    if arguments.keep_quantized and arguments.type not in ("Q8_0", "Q4_0", "Q4_K"):
        parser.error(f"{arguments.type} is not run as it is")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / f"synthetic-{arguments.type}.gguf"
        write_model(path, arguments.type, arguments.gigabytes)
        measure(path, arguments.runs, "kept" if arguments.keep_quantized else "unpacked")


def measure(path: Path, runs: int, how: str) -> None:
    size = path.stat().st_size
    words = "kept as it is" if how == "kept" else "loaded as bfloat16"
    print(f"{path.name}: {size / 1e9:.2f} GB, {words} by {os.cpu_count()} cores; medians of {runs}")
    loads = []
    for place in ("page cache", "disk"):
        pairs = []
        for _ in range(runs):
            for code in (READ, LOAD):
                path.read_bytes() if place == "page cache" else let_go(path)
                pairs.append(run(code, path, how))
        loads += pairs[1::2]
        reading, loading = (statistics.median(each["seconds"] for each in pairs[start::2]) for start in (0, 1))
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(pairs[::2], pairs[1::2], strict=True))
        print(f"from the {place}: reading {size / reading / 1e9:.2f} GB/s, loading {size / loading / 1e9:.2f} GB/s "
              f"({loading:.2f} s), ratio {ratio:.2f}")
    worst = max(loads, key=lambda each: each["peak"])
    print(f"kept {worst['kept'] / 1e9:.2f} GB, highest peak of a process {worst['peak'] / 1e9:.2f} GB (before loading "
          f"{worst['before'] / 1e9:.2f} GB), peak / kept {worst['peak'] / worst['kept']:.2f}")


def let_go(path: Path) -> None:
    """Asks the system to forget the file's cached pages, so that they come from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(code: str, path: Path, how: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code, str(path), how], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def write_model(path: Path, kind: str, gigabytes: float) -> None:
    """A Llama with tied embeddings whose matrices are of random blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(0).integers(0, 256, (VOCABULARY * HIDDEN // elements, block_bytes), dtype=np.uint8)
    for start in SCALES[kind]:
        random[:, start : start + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    matrix_bytes = sum(rows * columns for rows, columns in LAYER.values()) // elements * block_bytes
    layers = max(1, round((gigabytes * 1e9 - random.nbytes) / matrix_bytes))
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)

    def add(name: str, rows: int, columns: int) -> None:
        blocks = random[: rows * columns // elements].reshape(rows, -1)
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[kind])

    add("token_embd.weight", VOCABULARY, HIDDEN)
    for layer in range(layers):
        for name, (rows, columns) in LAYER.items():
            add(f"blk.{layer}.{name}", rows, columns)
        for name in ("attn_norm.weight", "ffn_norm.weight"):
            writer.add_tensor(f"blk.{layer}.{name}", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
