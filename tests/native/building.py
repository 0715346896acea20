"""The C++ programs of native/, built for the tests, and why they are not where they cannot be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"
PACKAGES = "nlohmann-json3-dev libpcre2-dev libsentencepiece-dev libutf8proc-dev libssl-dev"
LIBRARIES = {"nlohmann/json.hpp": "nlohmann-json", "pcre2.h": "PCRE2", "sentencepiece_processor.h": "SentencePiece",
             "utf8proc.h": "utf8proc", "openssl/evp.h": "OpenSSL"}


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


def runtimes() -> dict[str, str]:
    """Settings that build with libtorch and ExecuTorch out of this Python's packages."""
    settings = {"Python3_EXECUTABLE": sys.executable, "TORCH_ROOT": str(_package("torch"))}
    if _package("executorch") is not None:
        settings |= {"TORCHCHAT_EXECUTORCH": "ON", "TORCHCHAT_EXECUTORCH_WHEEL": "ON",
                     "EXECUTORCH_ROOT": str(_package("executorch"))}
    return settings


def _package(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


def build(folder: Path, **options: str) -> Path:
    """Configures and builds into `folder`; the folder. Raises `AssertionError` with the compiler's output."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    settings = [f"-D{name}={value}" for name, value in options.items()]
    _run(["cmake", "-S", str(NATIVE), "-B", str(folder), *generator, *settings])
    _run(["cmake", "--build", str(folder), "--parallel"])
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
