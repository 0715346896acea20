"""Build the C++ runner and the programs that test it: `make native`, `make test` and tests/native call this.

    python tools/build_native.py              build/native/torchchat-run
    python tools/build_native.py --tests      that, and the test programs, with and without sanitizers
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "native"
BUILD = ROOT / "build/native"
SANITIZED_BUILD = ROOT / "build/native-sanitized"
PROGRAM = "torchchat-run"
TEST_PROGRAMS = ("torchchat-seeds", "torchchat-turns")
SANITIZED_PROGRAMS = ("torchchat-probe", "torchchat-fuzz")
TOOLS = {"cmake": "cmake", "c++": "g++"}  # command -> Debian package
LIBRARIES = {  # header -> Debian package
    "nlohmann/json.hpp": "nlohmann-json3-dev", "pcre2.h": "libpcre2-dev",
    "sentencepiece_processor.h": "libsentencepiece-dev", "utf8proc.h": "libutf8proc-dev",
    "openssl/evp.h": "libssl-dev", "zlib.h": "zlib1g-dev"}
SANITIZERS = "address,undefined"
FUZZ_TARGET = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'
EMPTY_PROGRAM = "int main() {}\n"
NO_SANITIZERS = "no compiler here has AddressSanitizer; try: apt-get install libclang-rt-14-dev, for clang 14"


@dataclass(frozen=True)
class Missing:
    """Dependencies of the C++ runner that are not installed."""

    names: tuple[str, ...]  # commands or headers
    packages: tuple[str, ...]  # of Debian and Ubuntu

    def __str__(self) -> str:
        return (f"the C++ runner cannot be built without {', '.join(self.names)}\n"
                f"try: apt-get install {' '.join(self.packages)}")


def missing() -> Missing | None:
    """Return the first kind of dependency that is absent, tools before libraries; None if all are installed."""
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return Missing(tuple(tools), tuple(TOOLS[tool] for tool in tools))
    includes = "".join(f"#if !__has_include(<{header}>)\n#warning absent {header}\n#endif\n" for header in LIBRARIES)
    found = subprocess.run(["c++", "-E", "-x", "c++", "-", "-o", os.devnull], input=includes, capture_output=True,
                           text=True, check=False)
    headers = [header for header in LIBRARIES if f"absent {header}" in found.stderr]
    return Missing(tuple(headers), tuple(LIBRARIES[header] for header in headers)) if headers else None


@functools.cache
def release_settings() -> Mapping[str, str]:
    """Return CMake settings for a release build with libtorch and ExecuTorch from the packages of this Python."""
    settings = {"TORCHCHAT_TESTS": "ON", "CMAKE_BUILD_TYPE": "Release", "Python3_EXECUTABLE": sys.executable,
                "TORCH_ROOT": str(_package("torch"))}
    if _package("executorch") is not None:
        settings |= {"TORCHCHAT_EXECUTORCH": "ON", "TORCHCHAT_EXECUTORCH_WHEEL": "ON",
                     "EXECUTORCH_ROOT": str(_package("executorch"))}
    return settings


def _package(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


@functools.cache
def sanitizer_settings() -> Mapping[str, str] | None:
    """Return CMake settings for a build with sanitizers; None if no compiler here has them.

    clang is preferred where it has libFuzzer.
    """
    common = {"TORCHCHAT_SANITIZE": SANITIZERS, "TORCHCHAT_FUZZ": "ON", "TORCHCHAT_TESTS": "ON",
              "TORCHCHAT_AOTI": "OFF", "CMAKE_BUILD_TYPE": "Release", "CMAKE_CXX_FLAGS_RELEASE": "-O1"}  # asserts
    if _links("clang++", FUZZ_TARGET, f"-fsanitize=fuzzer,{SANITIZERS}"):
        return {**common, "CMAKE_CXX_COMPILER": "clang++", "CMAKE_C_COMPILER": "clang"}
    return common if _links("c++", EMPTY_PROGRAM, f"-fsanitize={SANITIZERS}") else None


def has_fuzzer() -> bool:
    """Return True if the fuzz target is built with libFuzzer; otherwise it reads the files it is given."""
    return "CMAKE_CXX_COMPILER" in (sanitizer_settings() or {})


def _links(compiler: str, program: str, flag: str) -> bool:
    if shutil.which(compiler) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", flag, "-o", f"{folder}/program"]
        return subprocess.run(command, input=program, capture_output=True, text=True, check=False).returncode == 0


def commands(folder: Path, targets: Sequence[str], settings: Mapping[str, str]) -> list[list[str]]:
    """Return the command lines that configure `folder` and build the targets there."""
    is_new = not (folder / "CMakeCache.txt").exists()
    generator = ["-G", "Ninja"] if is_new and shutil.which("ninja") else []
    return [["cmake", "-S", str(NATIVE), "-B", str(folder), *generator,
             *(f"-D{name}={value}" for name, value in settings.items())],
            ["cmake", "--build", str(folder), "--parallel", "--target", *targets]]


def build(folder: Path, targets: Sequence[str], settings: Mapping[str, str]) -> Path:
    """Configure and build the targets into `folder`, and return it.

    Raises `AssertionError` with the end of the compiler's output if that fails.
    """
    for command in commands(folder, targets, settings):
        run(*command)
    return folder


def run(*command: str | Path) -> str:
    """Return the output of a command. Raises `AssertionError` with the end of its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def main() -> int:
    """Build from the command line, with the compiler's output shown. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", action="store_true", help="build the test programs too, with and without sanitizers")
    parser.add_argument("--if-possible", action="store_true", help="exit with status 0 if a dependency is missing")
    arguments = parser.parse_args()
    absent = missing()
    if absent is not None:
        if arguments.if_possible:
            print(f"tests of the C++ runner will be skipped: {absent}", file=sys.stderr)
            return 0
        print(f"error: {absent}", file=sys.stderr)
        return 1
    steps = commands(BUILD, [PROGRAM, *(TEST_PROGRAMS if arguments.tests else ())], release_settings())
    if arguments.tests:
        settings = sanitizer_settings()
        if settings is None:
            print(f"note: {NO_SANITIZERS}", file=sys.stderr)
        else:
            steps += commands(SANITIZED_BUILD, SANITIZED_PROGRAMS, settings)
    for step in steps:
        status = subprocess.run(step, check=False).returncode
        if status != 0:
            return status
    print(f"built {os.path.relpath(BUILD / PROGRAM)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
