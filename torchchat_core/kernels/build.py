"""Compiles the kernels for the installed PyTorch."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from torchchat_core import progress
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.private_cache import code_folder, make_code_folder
from torchchat_core.unfinished import unfinished

FOLDER = Path(__file__).parent
# No -march: the code chooses when it runs. No contraction: products and sums are rounded one by one, as written.
# The last two let loops become vector instructions and leave their results as they are.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")
OPENMP = ("-Xpreprocessor", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_SECONDS = 600


def library_path() -> Path:
    """Where the compiled kernels are, or would be: a file of its own for each PyTorch, source and kind of machine."""
    digest = hashlib.sha256()
    for part in (torch.__version__, str(torch.compiled_with_cxx11_abi()), sys.platform, platform.machine(), *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(source.read_bytes() + b"\0")
    return code_folder("kernels", digest.hexdigest()[:16]) / "torchchat_kernels.so"


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, or the first of the usual ones. Raises `TorchchatError` without one."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if not command or shutil.which(command[0]) is None:
            raise TorchchatError(f"CXX is {quoted(named)}, which is not a program", "set CXX to a C++ compiler")
        return command
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise TorchchatError("there is no C++ compiler, so the fast CPU kernels cannot be built",
                             "install g++ or clang++, or set CXX")
    return [found]


def build(path: Path) -> None:
    """Compiles the kernels to `path`, whole or not at all. Raises `TorchchatError` where that fails."""
    compiler = find_compiler()
    make_code_folder(path.parent)
    with unfinished(path) as folder, progress.task("building the CPU kernels, once"):
        made, libraries = folder / path.name, _torch_folder() / "lib"
        compile_one = [*compiler, *FLAGS, *OPENMP, f"-I{_torch_folder() / 'include'}", "-c"]
        objects = {source: str(folder / f"{source.stem}.o") for source in sorted(FOLDER.glob("*.cpp"))}
        with ThreadPoolExecutor() as pool:  # one compiler each
            for _ in pool.map(lambda each: _run([*compile_one, str(each[0]), "-o", each[1]]), objects.items()):
                pass  # raises what it raised
        _run([*compiler, "-shared", *objects.values(), "-o", str(made), f"-L{libraries}", "-ltorch_cpu", "-lc10",
              *(openmp_of_torch() or OPENMP), f"-Wl,-rpath,{libraries}"])
        made.replace(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TorchchatError(f"the C++ compiler {command[0]} cannot be run: {error}") from None
    if done.returncode != 0:
        raise TorchchatError(f"the CPU kernels cannot be built with {command[0]}: {_first_error(done.stderr)}",
                             "set CXX to another compiler (g++ 11 or clang++ 14 and later)")


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def openmp_of_torch() -> list[str]:
    """PyTorch's own OpenMP: a second one would have threads of its own that compete with PyTorch's."""
    return [str(found) for pattern in ("libgomp*.so*", "libomp*.dylib", "libiomp*.dylib")
            for found in sorted((_torch_folder() / "lib").glob(pattern))][:1]


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if "error" in line]
    return (lines or output.strip().splitlines() or ["it says nothing"])[0][:300]
