"""The C++ programs of native/, built for the tests, and why they are not where they cannot be."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"
PACKAGES = "nlohmann-json3-dev libpcre2-dev libsentencepiece-dev libutf8proc-dev libssl-dev zlib1g-dev"
LIBRARIES = {"nlohmann/json.hpp": "nlohmann-json", "pcre2.h": "PCRE2", "sentencepiece_processor.h": "SentencePiece",
             "utf8proc.h": "utf8proc", "openssl/evp.h": "OpenSSL", "zlib.h": "zlib"}
SANITIZERS = "address,undefined"
FUZZED = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'
PLAIN = "int main() {}\n"


def missing() -> str | None:
    """Why the C++ runner cannot be built here, and what to do; None where it can."""
    tools = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if tools:
        return f"the C++ runner was not built: {' and '.join(tools)} not found; try: apt-get install cmake g++"
    includes = "".join(f"#if !__has_include(<{header}>)\n#warning absent {name}\n#endif\n"
                       for header, name in LIBRARIES.items())
    found = subprocess.run(["c++", "-E", "-x", "c++", "-", "-o", os.devnull], input=includes, capture_output=True,
                           text=True, check=False)
    absent = [name for name in LIBRARIES.values() if f"absent {name}" in found.stderr]
    if absent:
        return f"the C++ runner was not built: no {', '.join(absent)}; try: apt-get install {PACKAGES}"
    return None


@functools.cache
def runtimes() -> Mapping[str, str]:
    """Settings that build with libtorch and ExecuTorch out of this Python's packages."""
    settings = {"Python3_EXECUTABLE": sys.executable, "TORCH_ROOT": str(_package("torch"))}
    if _package("executorch") is not None:
        settings |= {"TORCHCHAT_EXECUTORCH": "ON", "TORCHCHAT_EXECUTORCH_WHEEL": "ON",
                     "EXECUTORCH_ROOT": str(_package("executorch"))}
    return settings


def _package(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


@functools.cache
def sanitizing() -> Mapping[str, str] | None:
    """Settings that build with sanitizers, by clang where that has libFuzzer; None where no compiler has them."""
    common = {"TORCHCHAT_SANITIZE": SANITIZERS, "TORCHCHAT_FUZZ": "ON", "TORCHCHAT_TESTS": "ON",
              "TORCHCHAT_AOTI": "OFF", "CMAKE_BUILD_TYPE": "Release", "CMAKE_CXX_FLAGS_RELEASE": "-O1"}  # asserts
    if _links("clang++", FUZZED, f"-fsanitize=fuzzer,{SANITIZERS}"):
        return {**common, "CMAKE_CXX_COMPILER": "clang++", "CMAKE_C_COMPILER": "clang"}
    return common if _links("c++", PLAIN, f"-fsanitize={SANITIZERS}") else None


def has_fuzzer() -> bool:
    """Whether the fuzz target is one of libFuzzer; else it reads the files that it is given."""
    return "CMAKE_CXX_COMPILER" in (sanitizing() or {})


def _links(compiler: str, program: str, flag: str) -> bool:
    if shutil.which(compiler) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", flag, "-o", f"{folder}/program"]
        return subprocess.run(command, input=program, capture_output=True, text=True, check=False).returncode == 0


def build(folder: Path, targets: Sequence[str], settings: Mapping[str, str]) -> Path:
    """Configures and builds the targets into `folder`; the folder. Raises `AssertionError` with the compiler's output.
    """
    is_new = not (folder / "CMakeCache.txt").exists()
    generator = ["-G", "Ninja"] if is_new and shutil.which("ninja") else []
    run("cmake", "-S", NATIVE, "-B", folder, *generator, *(f"-D{name}={value}" for name, value in settings.items()))
    run("cmake", "--build", folder, "--parallel", "--target", *targets)
    return folder


def run(*command: str | Path) -> str:
    """What a command prints. Raises `AssertionError` with the end of it where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout
