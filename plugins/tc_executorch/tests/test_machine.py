"""Threads and pages: what the process that runs ExecuTorch has to see to."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tc_executorch import machine
from torchchat_core.plugins import load_registry
from torchchat_core.specs import ExporterInfo, ExportRequest
from torchchat_core.testing.models import seeded, tiny_config

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SIZE = 8 * machine.LARGE_PAGE

THREADS_OF_A_PROMPT = """
import os, sys, torch
from pathlib import Path
from torchchat_core.plugins import load_registry
from torchchat_core.specs import ExecutorInfo, LoadRequest
torch.set_num_threads(2)
model = load_registry().find(ExecutorInfo, "executorch").make().load(
    LoadRequest(device="cpu", dtype="fp32", artifact=Path(sys.argv[1])))
before = set(os.listdir("/proc/self/task"))
session = model.session()
for _ in range(20):  # however late the second thread wakes up
    session.truncate(0)
    session.prefill([1] * 256)
print(len(set(os.listdir("/proc/self/task")) - before))
"""


@LINUX
def test_attention_starts_no_threads_inside_of_threads(tmp_path: Path) -> None:
    """Each of ExecuTorch's threads would have its products split among threads of their own, more than processors."""
    model = seeded(tiny_config(hidden_size=256, num_heads=4, num_kv_heads=4, head_dim=64, num_layers=1,
                               max_context=256))
    load_registry().find(ExporterInfo, "executorch").make().export(
        ExportRequest(module=model, path=tmp_path / "m.pte", device="cpu", dtype="fp32"))
    made = subprocess.run([sys.executable, "-c", THREADS_OF_A_PROMPT, str(tmp_path / "m.pte")], check=True,
                          capture_output=True, text=True)
    assert made.stdout.strip() == "0"


def test_threads_of_other_products_stay_what_they_were() -> None:
    setting = machine._product_threads()
    if setting is None:
        pytest.skip("this PyTorch has no MKL")
    before = setting(3)
    try:
        with machine.serial_products():
            assert setting(1) == 1
        assert setting(3) == 3
    finally:
        setting(before)


def large(begin: int) -> int:
    """Kilobytes on large pages of the memory at `begin`."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(place[1], 16) < begin + SIZE and int(place[2], 16) > begin
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1])
    return total


@LINUX
def test_what_is_allocated_inside_moves_to_large_pages_with_its_content() -> None:
    trial = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    trial.write(bytes(SIZE))
    here = -(-ctypes.addressof(ctypes.c_char.from_buffer(trial)) // machine.LARGE_PAGE) * machine.LARGE_PAGE
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(here), ctypes.c_size_t(machine.LARGE_PAGE), machine.MADV_COLLAPSE):
        pytest.skip("this system gives no large pages when asked")
    with machine.large_pages():
        made = torch.arange(SIZE // 8)
    for thread in threading.enumerate():
        if thread.name == "large pages":
            thread.join()
    assert large(made.data_ptr()) >= SIZE // 2 // 1024
    assert torch.equal(made, torch.arange(SIZE // 8))
