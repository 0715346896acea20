"""Decoding and prefill beside llama.cpp: the same random weights in both formats, both sides in turns.

    python tools/compare_llama_cpp.py [--shape stories110M] [--kind int4] [--executor compile] [--json]

Installs llama-cpp-python, which pip compiles for this machine, into an environment of its own in torchchat's cache
folder, unless --peer names a Python that has it. Both formats are written once, into the same folder, and mapped by
the sides as any model is. Each side is a process of its own with the same number of threads; they are measured one
after the other, round by round, and the ratio is the median of the rounds' ratios. Rates are tokens per second: of
decoding 64 tokens after a prompt of 16, and of a prefill of 128. Beside them stands how fast the weights are read, and
how fast this machine reads its memory, measured in the same rounds. The executors `executorch` and `aoti` run files
that are exported once, the first with the integers that ExecuTorch takes; how long that took is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from measure_compile import EXECUTORS, LONG_PROMPT, PROMPT, SHAPES, random_model

from tc_gguf.architecture import metadata_of, tensor_name
from torchchat_core.generation_options import SamplingOptions
from torchchat_core.measure.bandwidth import read_speed
from torchchat_core.models.rope_layout import interleaved_rows
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import build_model
from torchchat_core.pipeline import ModelRequest, fetch_files, open_checkpoint
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.recipe import RecipeReport, parse_recipe
from torchchat_core.quantization.writing import write_quantised
from torchchat_core.sampling import Sampler
from torchchat_core.small_files import cache_folder
from torchchat_core.specs import ExecutorInfo, ExporterInfo, ExportRequest, LoadRequest, ModelFiles

KINDS = {  # what is compared: our recipe, their type
    "int4": ({"linear:int4": {"groupsize": 32}}, "Q4_0"),
    "int8": ({"linear:int8": {}}, "Q8_0"),
    "bf16": (None, "BF16"),
}
EXPORTED = {  # exporter, suffix, and the recipes that are other ones there; None: not for this kind
    "aoti": ("aoti-package", ".pt2", {}),
    "executorch": ("executorch", ".pte", {"int4": {"linear:a8w4dq": {"groupsize": 32}}, "int8": {"linear:a8w8dq": {}},
                                          "bf16": None}),
}  # type: dict[str, tuple[str, str, dict[str, Any]]]
NEW_TOKENS = 64
PAUSE = 0.3  # seconds between two sides, in which the threads of the first one stop waiting for work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated; stories110M, Llama-3.2-1B")
    parser.add_argument("--kind", choices=KINDS, action="append", help="may be repeated; all of them")
    parser.add_argument("--executor", choices=[*EXECUTORS, *EXPORTED], action="append",
                        help="may be repeated; eager and compile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("EXECUTOR", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        serve(*arguments.serve)
        return
    peer = arguments.peer or installed_peer()
    for shape in arguments.shape or ["stories110M", "Llama-3.2-1B"]:
        for kind in arguments.kind or list(KINDS):
            found = compare(shape, kind, arguments.executor or list(EXECUTORS), peer, arguments.threads,
                            arguments.rounds)
            print(json.dumps(found) if arguments.json else lines(found), flush=True)


def installed_peer() -> str:
    """The Python of an environment with llama-cpp-python, which is made where it is not there yet."""
    folder = cache_folder() / "peers" / "llama-cpp-python"
    python = str(folder / "bin" / "python")
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode \
            if Path(python).exists() else True:
        print("installing llama-cpp-python, which takes some minutes", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python", "numpy"], check=True)
    return python


# ---- measuring ----------------------------------------------------------------------------------------------------


def compare(shape: str, kind: str, executors: list[str], peer: str, threads: int, rounds: int) -> dict[str, Any]:
    """The rates of all sides, round by round after one that is not counted, and what they come to."""
    here = Path(__file__)
    path = written_gguf(shape, KINDS[kind][1])
    ours = {executor: written(executor, shape, kind) for executor in executors}
    with ExitStack() as stack:
        commands = {"llama.cpp": [peer, str(here.with_name("llama_cpp_server.py")), str(path), str(threads)]}
        commands |= {executor: [sys.executable, str(here), "--threads", str(threads), "--serve", executor, str(file)]
                     for executor, file in ours.items() if file is not None}
        sides = {name: stack.enter_context(side(command)) for name, command in commands.items()}
        for process in sides.values():
            read(process, until="ready")
        found = {name: [] for name in sides}  # type: dict[str, list[tuple[float, float]]]
        speeds = []
        for counted in range(rounds + 1):
            time.sleep(PAUSE)
            speeds.append(read_speed())
            for name, process in sides.items():
                time.sleep(PAUSE)
                rates = (NEW_TOKENS / ask(process, "decode", PROMPT, NEW_TOKENS),
                         len(LONG_PROMPT) / ask(process, "prefill", LONG_PROMPT))
                if counted:
                    found[name].append(rates)
        results = {name: summary(rates, found["llama.cpp"]) for name, rates in found.items()}
        return {"shape": shape, "kind": kind, "their_type": KINDS[kind][1], "sides": results,
                "memory_read_speed": statistics.median(speeds), "weight_bytes": weight_bytes(path, kind)}


def summary(rates: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for index, what in enumerate(("decode", "prefill")):
        series, other = [pair[index] for pair in rates], [pair[index] for pair in theirs]
        result[what] = {"median": statistics.median(series), "least": min(series), "most": max(series),
                        "ratio": statistics.median(a / b for a, b in zip(series, other, strict=True))}
    return result


def lines(found: dict[str, Any]) -> str:
    memory = found["memory_read_speed"]
    text = [f"{found['shape']} {found['kind']} beside {found['their_type']}; memory is read at {memory / 1e9:.1f} GB/s"]
    for name, each in found["sides"].items():
        decode, prefill = each["decode"], each["prefill"]
        speed = decode["median"] * found["weight_bytes"]["llama.cpp" if name == "llama.cpp" else "ours"]
        text.append(f"  {name:10} decode {rate_text(decode)}, {speed / 1e9:4.1f} GB/s = {speed / memory:4.0%}; prefill "
                    f"{rate_text(prefill)}")
    return "\n".join(text)


def rate_text(rate: dict[str, float]) -> str:
    return f"{rate['median']:6.1f} ({rate['least']:.0f}-{rate['most']:.0f}) t/s x {rate['ratio']:.2f}"


@contextmanager
def side(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that says when it has its model in memory, and then waits."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        if process.stdin:
            process.stdin.close()


def ask(process: subprocess.Popen[str], *question: Any) -> float:
    """Seconds."""
    if process.stdin is None:
        raise RuntimeError("the process has no standard input")
    print(json.dumps(question), file=process.stdin, flush=True)
    return float(read(process))


def read(process: subprocess.Popen[str], until: str | None = None) -> str:
    if process.stdout is None:
        raise RuntimeError("the process has no standard output")
    for line in process.stdout:
        if until is None or line.strip() == until:
            return line
    raise RuntimeError(f"the process {process.args!r} ended early")


# ---- our side -----------------------------------------------------------------------------------------------------


def written(executor: str, shape: str, kind: str) -> Path | None:
    """What our side opens, made where it is missing: the file with bfloat16 matrices, a folder quantised from it, or a
    file exported from it; None where the executor has nothing of that kind."""
    unquantised = written_gguf(shape, KINDS["bf16"][1])
    exporter, suffix, others = EXPORTED.get(executor, ("", "", {}))
    recipe = others.get(kind, KINDS[kind][0])
    if not exporter:
        return unquantised if recipe is None else written_folder(unquantised, kind, recipe)
    path = unquantised.with_name(f"{shape}-{kind}-{executor}-{torch.__version__}{suffix}")
    if kind in others and recipe is None:
        return None
    if not path.exists():
        export(unquantised, exporter, recipe, path)
    return path


def written_folder(unquantised: Path, kind: str, recipe: dict[str, Any]) -> Path:
    folder = unquantised.with_name(unquantised.stem + f"-{kind}")
    if not folder.exists():
        files, module, report = quantised(unquantised, recipe)
        without_vocabulary = dataclasses.replace(files, tokenizer=())
        if report is None:
            raise RuntimeError(f"nothing was quantised by {recipe}")
        write_quantised(module, recipe, report, without_vocabulary, load_registry(), folder, "bf16")
    return folder


def export(unquantised: Path, exporter: str, recipe: dict[str, Any] | None, path: Path) -> None:
    """Says how long the exporter took, and the most memory that this process had until then."""
    files, module, _ = quantised(unquantised, recipe)
    info: ExporterInfo = load_registry().find(ExporterInfo, exporter)
    started = time.perf_counter()
    info.make().export(ExportRequest(module=module, path=path, device="cpu", dtype="bf16", files=files, recipe=recipe,
                                     schemes=tuple(recipe or ())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{path.name}: exported in {time.perf_counter() - started:.1f} s, {path.stat().st_size / 1e9:.2f} GB; peak "
          f"{peak / 1e9:.2f} GB, bfloat16 {unquantised.stat().st_size / 1e9:.2f} GB", file=sys.stderr)


def quantised(unquantised: Path, recipe: dict[str, Any] | None) -> tuple[ModelFiles, Transformer, RecipeReport | None]:
    registry = load_registry()
    files, module = opened(unquantised)
    if recipe is None:
        return files, module, None
    return files, module, parse_recipe(json.dumps(recipe), registry).settle(registry, "cpu", "bf16").apply(module)


def opened(path: Path) -> tuple[ModelFiles, Transformer]:
    registry = load_registry()
    request = ModelRequest(checkpoint_path=str(path))
    files = fetch_files(request, registry)
    return files, build_model(open_checkpoint(request, files, registry), torch.bfloat16, "cpu")


def serve(executor: str, path: str) -> None:
    """Answers as llama_cpp_server.py does."""
    info: ExecutorInfo = load_registry().find(ExecutorInfo, executor)
    artifact = Path(path) if executor in EXPORTED else None
    module = None if artifact is not None else opened(Path(path))[1]
    model = info.make().load(LoadRequest(device="cpu", dtype="bf16", module=module, artifact=artifact))
    print("ready", flush=True)
    for line in sys.stdin:
        what, tokens, *count = json.loads(line)
        session = model.session(512)
        started = time.perf_counter()
        sampler = Sampler(SamplingOptions(temperature=0.0))
        token = sampler.choose(session.prefill(tokens))
        if what == "decode":
            started = time.perf_counter()
            for _ in range(*count):
                token = sampler.choose(session.decode(token))
        print(time.perf_counter() - started, flush=True)
        session.close()


def weight_bytes(path: Path, kind: str) -> dict[str, int]:
    """What is read for each token: all matrices, of which the embedding makes the logits."""
    tensors = gguf.GGUFReader(path).tensors
    sizes = [(int(tensor.n_elements), int(tensor.shape[1])) for tensor in tensors if len(tensor.shape) == 2]
    numbers, rows = (sum(column) for column in zip(*sizes, strict=True))
    ours = {"int4": numbers * 9 // 16, "int8": numbers + 2 * rows, "bf16": numbers * 2}[kind]
    return {"llama.cpp": sum(int(tensor.n_bytes) for tensor in tensors), "ours": ours}


# ---- their side ---------------------------------------------------------------------------------------------------


def written_gguf(shape: str, kind: str) -> Path:
    """The file of the random model, written where it is not there yet: that takes longer than measuring."""
    path = cache_folder() / "peers" / f"{shape}-{kind}-{torch.__version__}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            torch.manual_seed(0)  # the same weights in every type
            write_gguf(random_model(shape, "bf16"), kind, Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
    return path


def write_gguf(module: Transformer, kind: str, path: Path) -> None:
    """The model with all of its matrices in one type, and no vocabulary."""
    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata_of(config, "llama").items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    writer.add_tokenizer_model("none")
    for name, parameter in module.named_parameters():
        weight = parameter.detach()
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleaved_rows(weight, config.num_heads if ".q_proj" in name else config.num_kv_heads)
        stored = gguf.GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
        values = weight.float().numpy()
        data = values if weight.dim() < 2 else gguf.quantize(values, stored)
        writer.add_tensor(tensor_name(name), np.ascontiguousarray(data), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
