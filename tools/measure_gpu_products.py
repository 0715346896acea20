"""Products with quantised weights on a GPU, one matrix at a time: microseconds, and the bytes of the weights a second.

    python tools/measure_gpu_products.py [--rows 14336 --columns 4096]

Each is recorded twenty times in a CUDA graph, so that starting kernels costs nothing; the best of ten replays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from torchchat_core.quantization.layers import IntegerWeights, QuantizedLinear, WeightFormat
from torchchat_core.quantization.running import TinygemmLinear, TritonLinear

COUNTS = (1, 4, 16, 128)
REPEATS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this machine has no GPU, or this build of PyTorch no CUDA")
    rows, columns = arguments.rows, arguments.columns
    dense = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    layers = {"int4": random_layer(WeightFormat(bits=4, group_size=128), rows, columns),
              "int8": random_layer(WeightFormat(bits=8), rows, columns)}
    products = {"bf16, cuBLAS": (lambda x: F.linear(x, dense), dense.nbytes),
                "int4, tinygemm": (TinygemmLinear(layers["int4"], torch.bfloat16), layers["int4"].values.nbytes),
                "int4, Triton": (TritonLinear(layers["int4"]), layers["int4"].values.nbytes),
                "int8, Triton": (TritonLinear(layers["int8"]), layers["int8"].values.nbytes)}
    counts = ", ".join(map(str, COUNTS))
    print(f"{torch.cuda.get_device_name()}, {rows} x {columns}: microseconds for {counts} rows of bf16")
    for name, (run, size) in products.items():
        times = [seconds(run, torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)) for count in COUNTS]
        print(f"{name:<16}" + "".join(f"{time * 1e6:9.1f}" for time in times) + f"   {size / times[0] / 1e9:5.0f} GB/s")


def random_layer(form: WeightFormat, rows: int, columns: int) -> QuantizedLinear:
    shapes = form.shapes(rows, columns)
    values = torch.randint(0, 256, shapes["values"][0], dtype=torch.uint8, device="cuda")
    scales = torch.rand(shapes["scales"][0], device="cuda").half() / 100
    return QuantizedLinear(IntegerWeights(format=form, columns=columns, values=values, scales=scales), None)


def seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    for _ in range(3):
        run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run(x)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(10):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / REPEATS)
    return best


if __name__ == "__main__":
    main()
