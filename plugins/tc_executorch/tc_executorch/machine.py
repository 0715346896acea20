"""What ExecuTorch's libraries leave to the process that they run in: no threads inside of threads, and large pages.

All of it is for speed: where a library or the system has no such thing, nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

POOL = "_ZN10executorch9extension10threadpool15get_pthreadpoolEv"  # of the bindings: ExecuTorch's threads
PATIENCE = 1.0  # seconds that the threads of a pool wait for each other
LARGE_PAGE = 2 << 20
BEHIND_OTHERS = 10  # a nice value
MADV_COLLAPSE = 25  # since Linux 6.1: move what is there to large pages, now
PAGES_ALLOWED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
Setting = Callable[[int], int]


@cache
def _torch_library() -> ctypes.CDLL | None:
    found = sorted(Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"))
    return ctypes.CDLL(str(found[0])) if found else None


@cache
def _product_threads() -> Setting | None:
    """Sets the threads of MKL's products that the calling thread asks for; gives the number before."""
    setting: Setting | None = getattr(_torch_library(), "MKL_Set_Num_Threads_Local", None)
    return setting


@contextmanager
def serial_products() -> Iterator[None]:
    """This thread's products of matrices take no further threads: attention has split the work among its own."""
    setting = _product_threads()
    if setting is None:
        yield
        return
    before = setting(1)
    try:
        yield
    finally:
        setting(before)


def serial_products_in_pool(bindings: str, threads: int) -> None:
    """The same, for good, in the threads of ExecuTorch's pool; without it two of those become four, on two cores."""
    setting, library = _product_threads(), _torch_library()
    pool, run = getattr(ctypes.CDLL(bindings), POOL, None), getattr(library, "pthreadpool_parallelize_1d", None)
    if setting is None or pool is None or run is None or threads < 2:
        return
    everyone, caller = threading.Barrier(threads), threading.get_ident()

    def task(_context: int | None, _index: int) -> None:
        try:
            everyone.wait(PATIENCE)  # so that each thread has one task
        except threading.BrokenBarrierError:
            return
        if threading.get_ident() != caller:
            setting(1)

    called = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(task)
    pool.restype = ctypes.c_void_p
    run(ctypes.c_void_p(pool()), called, None, ctypes.c_size_t(threads), ctypes.c_uint32(0))


@contextmanager
def large_pages() -> Iterator[None]:
    """Moves what is allocated inside to large pages, for weights that are read from end to end for every token.

    That takes as long as packing the weights does, so that a thread does it while the first tokens are computed.
    """
    if not _has_large_pages():
        yield
        return
    before = set(_allocated())
    yield
    places = sorted(set(_allocated()) - before)
    threading.Thread(target=_move, args=(places,), name="large pages", daemon=True).start()


def _move(places: list[tuple[int, int]]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND_OTHERS)  # of this thread alone, on Linux
    advise = ctypes.CDLL(None).madvise
    for begin, end in places:
        for page in range(-(-begin // LARGE_PAGE) * LARGE_PAGE, end - LARGE_PAGE + 1, LARGE_PAGE):
            # Where there are too few large pages, or the memory is no longer there, nothing happens.
            advise(ctypes.c_void_p(page), ctypes.c_size_t(LARGE_PAGE), MADV_COLLAPSE)


def _has_large_pages() -> bool:
    return sys.platform == "linux" and PAGES_ALLOWED.exists() and "[never]" not in PAGES_ALLOWED.read_text()


def _allocated() -> Iterator[tuple[int, int]]:
    """Memory that stands for no file, by first and last address."""
    with Path("/proc/self/maps").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            place, access, _offset, _device, inode, *name = line.split()
            if inode == "0" and access.startswith("rw") and (not name or name == ["[heap]"]):
                begin, _, end = place.partition("-")
                yield int(begin, 16), int(end, 16)
