"""What compiling for CUDA takes beside PyTorch: CUDA's headers, and the driver's library to link with.

PyTorch's compiler looks for an installed toolkit. Its wheels bring the headers along, and the driver is there where a
GPU is: that is enough, so that nobody has to install a toolkit for this.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from torchchat_core.errors import TorchchatError

NEEDED = "cuda.h"
LOADED_LIBRARIES = Path("/proc/self/maps")


@contextmanager
def cuda_toolkit() -> Iterator[None]:
    """Shows PyTorch's compiler a toolkit made of links, until the end of the block.

    Raises `TorchchatError` where there are no headers.
    """
    from torch.utils import cpp_extension

    installed = cpp_extension.CUDA_HOME
    include = _include(installed)
    with tempfile.TemporaryDirectory(prefix="torchchat-cuda-") as name:
        home = Path(name)
        (home / "lib64").mkdir()
        (home / "include").symlink_to(include)
        for library in _libraries(installed):
            link = home / "lib64" / f"{library.name.partition('.so')[0]}.so"
            if not link.exists():
                link.symlink_to(library)
        cpp_extension.CUDA_HOME = str(home)  # which the compiler reads when it puts its command together
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = installed


def gpu_architecture() -> str:
    """Of the GPU that PyTorch uses, as its machine code is called: "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _include(installed: str | None) -> Path:
    found = importlib.util.find_spec("nvidia")
    wheels = [folder for place in (found.submodule_search_locations or () if found else ())
              for folder in sorted(Path(place).glob("*/include"))]
    own = [] if installed is None else [Path(installed) / "include"]
    for folder in (*own, *wheels):
        if (folder / NEEDED).is_file():
            return folder.resolve()
    raise TorchchatError(f"CUDA's headers ({NEEDED}) are neither in an installed toolkit nor in PyTorch's wheels",
                         "pip install nvidia-cuda-runtime, of the CUDA release that PyTorch was built for, or set "
                         "CUDA_HOME to an installed toolkit")


def _libraries(installed: str | None) -> Iterator[Path]:
    """What is there to link with, the best first: the driver, as this process has it, and an installed toolkit's."""
    torch.cuda.init()
    if LOADED_LIBRARIES.exists():
        paths = {Path(line.split(maxsplit=5)[-1]) for line in LOADED_LIBRARIES.read_text().splitlines()
                 if "/libcuda.so" in line or "/libcudart.so" in line}
        yield from sorted(paths)
    if installed is not None:
        yield from sorted([*Path(installed).glob("lib64/*.so"), *Path(installed).glob("lib64/stubs/*.so")])
