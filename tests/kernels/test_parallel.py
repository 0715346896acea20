"""Kernels run their loops on the engine's thread pool, and PyTorch's operations run on the calling thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from torchchat_core import kernels
from torchchat_core.kernels.serial import is_small, one_thread

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
THREADS = 5

# Runs prompts of 10 and 40 tokens through a model with 1.3 MB of weights, and prints the number of new threads.
SMALL_PREFILL = """
import os, torch
from tc_eager.executor import EagerExecutor
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.specs import LoadRequest
torch.set_num_threads(4)
module = Transformer(ModelConfig(architecture="llama", vocab_size=128, hidden_size=128, intermediate_size=256,
    num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, max_context=64)).eval().requires_grad_(False)
session = EagerExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module)).session()
before = len(os.listdir("/proc/self/task"))
session.prefill(list(range(10)))
session.prefill(list(range(40)))
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""


@pytest.fixture
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("switch", ["on", "off"])
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list the threads of a process")
def test_a_small_model_runs_on_the_calling_thread(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, switch)
    done = subprocess.run([sys.executable, "-c", SMALL_PREFILL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [40, 700])
@pytest.mark.parametrize("biased", [False, True])
def test_matmul_of_many_rows_on_several_threads_equals_linear(dtype: torch.dtype, rows: int, biased: bool,
                                                              several_threads: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 512).to(dtype)
    weights = [torch.randn(outputs, 512).to(dtype) for outputs in (900, 800, 7)]  # the last one stays whole
    bias = torch.randn(1707).to(dtype) if biased else None
    expected = functional.linear(x.float(), torch.cat(weights).float(), None if bias is None else bias.float())
    exact = 1e-4 if dtype == torch.float32 else 1e-2
    for found, part in ((torch.ops.torchchat.dense_linears(x, weights, bias), expected),
                        (torch.ops.torchchat.dense_linear(x, weights[0], None if bias is None else bias[:900]),
                         expected[:, :900])):
        torch.testing.assert_close(found.float(), part, atol=exact * 30, rtol=exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_matmul_on_several_threads_equals_one_thread(bits: int, several_threads: None) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 256, (512, 512 * bits // 8), dtype=torch.uint8)
    packed = torch.ops.torchchat.pack_quantized(values, torch.rand(512, 8).half(), None, 512, bits, 64)
    x = torch.randn(200, 512)
    several = torch.ops.torchchat.quantized_linear(x, packed, None, 512, bits, 64, False)
    torch.set_num_threads(1)
    assert torch.equal(several, torch.ops.torchchat.quantized_linear(x, packed, None, 512, bits, 64, False))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("held", [0, 100])
def test_attention_on_several_threads_equals_one_thread(kv_heads: int, held: int, several_threads: None
                                                        ) -> None:
    def attended() -> Tensor:
        torch.manual_seed(0)
        caches = [torch.randn(kv_heads, 400, 64) for _ in range(2)]
        query, key, value = (torch.randn(300, heads, 64) for heads in (6, kv_heads, kv_heads))
        found: Tensor = torch.ops.torchchat.cached_attention(query, key, value, *caches, torch.tensor([held, 0]), 0.1)
        return found

    several = attended()
    torch.set_num_threads(1)
    torch.testing.assert_close(several, attended(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("context", [kernels.engine_threads, one_thread])
def test_engine_threads_limit_pytorch_only_on_the_calling_thread_and_for_a_time(context: Any, several_threads: None
                                                                                ) -> None:
    counts: list[int] = []

    def count_inside() -> None:
        with context():
            counts.append(torch.get_num_threads())
            with context():
                counts.append(torch.get_num_threads())
            counts.append(torch.get_num_threads())
            other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
            other.start()
            other.join()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        count_inside()
    assert (counts, torch.get_num_threads()) == ([1, 1, 1, THREADS], THREADS)


def test_a_model_is_small_up_to_its_limit_of_bytes() -> None:
    assert is_small(torch.nn.Linear(1 << 11, 1 << 10, bias=False))  # 8 MiB
    assert not is_small(torch.nn.Linear(1 << 11, 1 << 10))


def test_an_error_in_a_parallel_loop_reaches_the_caller(several_threads: None) -> None:
    x, weight = torch.randn(600, 512), torch.randn(1024, 512)
    with pytest.raises(RuntimeError, match="tensor"):
        torch.ops.torchchat.dense_linear(x, weight, torch.zeros(1024, dtype=torch.int64))
    torch.testing.assert_close(torch.ops.torchchat.dense_linear(x, weight, None), x @ weight.T, atol=1e-3, rtol=1e-3)
