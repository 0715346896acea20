"""The CPU kernels equal a plain computation with the same rounding, with every kind of instructions that is here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchchat_core import kernels
from torchchat_core.kernels.build import library_path
from torchchat_core.quantization.layers import packed_values
from torchchat_core.small_files import cache_folder

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
SHAPES = [(16, 32, 32), (64, 64, 32), (50, 100, 32), (33, 256, 128), (7, 288, 256), (17, 40, 64), (16, 4, 32),
          (20, 45, 32)]
operators = torch.ops.torchchat


def matrix(outputs: int, columns: int, bits: int, group: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Packed weights, and the float32 matrix that they stand for."""
    generator = torch.Generator().manual_seed(outputs * columns + bits)
    groups = -(-columns // group)
    values = torch.randint(0, 2**bits, (outputs, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.02 + 0.01).half()
    offsets = (torch.randn(outputs, groups, generator=generator) * 0.1).half() if asymmetric else None
    stored = values.float() - (0 if asymmetric else 2 ** (bits - 1))
    full = stored * scales.float().repeat_interleave(group, 1)[:, :columns]
    if offsets is not None:
        full += offsets.float().repeat_interleave(group, 1)[:, :columns]
    packed = operators.pack_quantized(packed_values(values, bits), scales, offsets, columns, bits, group)
    return packed, full


def rounded(x: Tensor) -> Tensor:
    """Activations [rows, columns] as the kernels see them: int8 times a scale, in blocks of 32."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return ((padded * inverse).round() * (largest / 127)).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_those_of_the_rounded_activations(instructions: str, bits: int, asymmetric: bool) -> None:
    for outputs, columns, group in SHAPES:
        packed, full = matrix(outputs, columns, bits, group, asymmetric)
        assert packed.numel() == kernels.packed_bytes(outputs, columns, bits, group, asymmetric)
        unpacked = operators.unpack_quantized(packed, outputs, columns, bits, group, asymmetric)
        torch.testing.assert_close(unpacked, full, atol=1e-6, rtol=0)
        for rows in (1, 3, 5, 17, 200):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
            bias = torch.randn(outputs)
            expected = rounded(x) @ full.T + bias
            found = operators.quantized_linear(x, packed, bias, outputs, bits, group, asymmetric)
            torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_float32_result_once(instructions: str, dtype: torch.dtype) -> None:
    packed, _ = matrix(50, 96, 4, 32, False)
    x = torch.randn(5, 96).to(dtype)
    exact = operators.quantized_linear(x.float(), packed, None, 50, 4, 32, False)
    assert torch.equal(operators.quantized_linear(x, packed, None, 50, 4, 32, False), exact.to(dtype))


def test_a_row_gives_the_same_whether_alone_or_among_others(instructions: str) -> None:
    packed, _ = matrix(64, 128, 4, 32, False)
    x = torch.randn(31, 128)
    together = operators.quantized_linear(x, packed, None, 64, 4, 32, False)
    alone = torch.cat([operators.quantized_linear(row[None], packed, None, 64, 4, 32, False) for row in x])
    assert torch.equal(together, alone)


def test_bfloat16_products_equal_those_in_float32(instructions: str) -> None:
    for outputs, columns in ((64, 256), (7, 77), (1, 1)):
        weight = torch.randn(outputs, columns).bfloat16()
        bias = torch.randn(outputs).bfloat16()
        for rows in (1, 2, 3, 4):
            x = torch.randn(rows, columns).bfloat16()
            expected = x.float() @ weight.float().T + bias.float()
            found = operators.dense_linear(x, weight, bias)
            torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_products_of_any_number_of_rows_are_those_of_linear(instructions: str, dtype: torch.dtype) -> None:
    for outputs, columns in ((64, 256), (7, 77), (600, 512)):
        weight, bias = torch.randn(outputs, columns).to(dtype), torch.randn(outputs).to(dtype)
        for rows in (1, 4, 5, 40):
            x = torch.randn(rows, columns).to(dtype)
            expected = x.float() @ weight.float().T + bias.float()
            exact = 1e-5 if dtype == torch.float32 else 1e-2
            for shift, wanted in ((bias, expected), (None, expected - bias.float())):
                found = operators.dense_linear(x, weight, shift)
                assert found.dtype == dtype
                torch.testing.assert_close(found.float(), wanted, atol=exact * float(wanted.abs().max()), rtol=exact)


def caches(kv_heads: int, capacity: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(kv_heads, capacity, size).to(dtype), torch.randn(kv_heads, capacity, size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_over_the_used_part_of_a_cache_is_softmax_attention(instructions: str, dtype: torch.dtype,
                                                                     window: int) -> None:
    for heads, kv_heads, size in ((4, 2, 64), (3, 1, 10), (2, 2, 40), (6, 6, 128)):
        for held, count in ((0, 1), (70, 1), (3, 4), (0, 20), (30, 20)):
            length = held + count
            keys, values = caches(kv_heads, 100, size, dtype)
            before = keys.clone(), values.clone()
            query, key, value = (torch.randn(count, n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
            found = operators.cached_attention(query, key, value, keys, values, torch.tensor([held, window]), 0.3)
            assert torch.equal(keys[:, held:length], key.transpose(0, 1))
            assert torch.equal(values[:, held:length], value.transpose(0, 1))
            for cache, old in zip((keys, values), before, strict=True):
                assert torch.equal(cache[:, :held], old[:, :held])
                assert torch.equal(cache[:, length:], old[:, length:])
            wide = [x[:, :length].float().repeat_interleave(heads // kv_heads, 0) for x in (keys, values)]
            scores = query.float().transpose(0, 1) @ wide[0].transpose(1, 2) * 0.3  # [heads, count, length]
            row, column = torch.arange(held, length)[:, None], torch.arange(length)
            hidden = (column > row) | (column <= row - window if window else False)
            expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ wide[1]
            exact = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found.float(), expected.transpose(0, 1).flatten(1), atol=exact, rtol=exact)


def test_scores_of_any_size_give_finite_attention(instructions: str) -> None:
    keys, values = caches(1, 8, 16, torch.float32)
    query, key = torch.full((1, 1, 16), 1e18), torch.full((1, 1, 16), 1e18)
    found = operators.cached_attention(query, key, key, keys.fill_(1.0), values, torch.tensor([7, 0]), 1.0)
    assert torch.equal(found, key.flatten(1))


@pytest.mark.parametrize("held", [0, 15, 16])
def test_scores_beyond_all_numbers_hide_nothing(instructions: str, held: int) -> None:
    def attended(query: float, key: float) -> Tensor:
        keys, values = caches(1, 32, 8, torch.float32)
        new = torch.full((1, 1, 8), key)
        found: Tensor = operators.cached_attention(torch.full((1, 1, 8), query), new, torch.ones(1, 1, 8),
                                                   keys.fill_(key), values.fill_(1.0), torch.tensor([held, 0]), 1.0)
        return found

    assert attended(1e20, -1e20).isnan().all()  # as a softmax of minus infinities is
    torch.testing.assert_close(attended(1.0, torch.finfo(torch.float32).min / 8), torch.ones(1, 8))


def test_attention_refuses_what_does_not_fit_and_leaves_the_cache(instructions: str) -> None:
    query, key = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    keys, values = caches(2, 16, 8, torch.float32)
    before = keys.clone()
    whole = (query, key, key, keys, values, torch.tensor([3, 0]), 1.0)
    for at, wrong in ((0, query.bfloat16()), (0, torch.randn(1, 3, 8)), (0, query[0]), (1, torch.randn(2, 2, 8)),
                      (2, torch.randn(1, 2, 4)), (3, keys[:1]), (3, keys[:, ::2]), (5, torch.tensor([16, 0])),
                      (5, torch.tensor([-1, 0])), (5, torch.tensor([3])), (5, torch.tensor([3.0, 0.0]))):
        with pytest.raises(RuntimeError):
            operators.cached_attention(*whole[:at], wrong, *whole[at + 1 :])
    assert torch.equal(keys, before)


def test_what_is_not_finite_makes_the_row_not_a_number(instructions: str) -> None:
    packed, _ = matrix(16, 64, 4, 32, False)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 64)
        x[1, 40] = value
        found = operators.quantized_linear(x, packed, None, 16, 4, 32, False)
        assert found.isnan().sum(1).tolist() == [0, 16, 0]


def test_wrong_arguments_are_refused_before_anything_is_read(instructions: str) -> None:
    packed, _ = matrix(16, 64, 4, 32, False)
    x = torch.randn(1, 64)
    for arguments in ((x, packed[:-1], None, 16, 4, 32, False), (x, packed, None, 32, 4, 32, False),
                      (x, packed, None, 16, 3, 32, False), (x, packed, None, 16, 4, 33, False),
                      (x[:, :32], packed, None, 16, 4, 32, False), (x, packed, torch.ones(3), 16, 4, 32, False),
                      (x.double(), packed, None, 16, 4, 32, False), (x[0], packed, None, 16, 4, 32, False)):
        with pytest.raises(RuntimeError):
            operators.quantized_linear(*arguments)
    values, scales = torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 2).half()
    for wrong in ((values, scales, None, 60, 4, 32), (values, scales, None, 64, 8, 32),
                  (values[0], scales, None, 64, 4, 32), (values, scales[:3], None, 64, 4, 32),
                  (values, scales, scales.float(), 64, 4, 32), (values, scales, None, 0, 4, 32),
                  (values.int(), scales, None, 64, 4, 32)):
        with pytest.raises(RuntimeError):
            operators.pack_quantized(*wrong)


def test_products_made_together_are_those_made_one_by_one(instructions: str) -> None:
    sizes = [48, 7, 33]
    packed = [matrix(outputs, 100, 4, 32, False)[0] for outputs in sizes]
    weights, bias = [torch.randn(outputs, 100) for outputs in sizes], torch.randn(sum(sizes))
    for rows in (1, 3, 40):
        x = torch.randn(rows, 100)
        for shift in (None, bias):
            parts = [None] * 3 if shift is None else list(shift.split(sizes))
            alone = [operators.quantized_linear(x, each, part, outputs, 4, 32, False)
                     for each, part, outputs in zip(packed, parts, sizes, strict=True)]
            together = operators.quantized_linears(x, packed, shift, sizes, 4, 32, False)
            assert torch.equal(together, torch.cat(alone, 1))
            alone = [operators.dense_linear(x, each, part) for each, part in zip(weights, parts, strict=True)]
            torch.testing.assert_close(operators.dense_linears(x, weights, shift), torch.cat(alone, 1))


def test_matrices_that_do_not_belong_together_are_refused(instructions: str) -> None:
    packed = [matrix(outputs, 64, 4, 32, False)[0] for outputs in (32, 16)]
    x = torch.randn(2, 64)
    for wrong in ([packed[:1], [32, 16]], [[], []], [packed, [32, 32]], [packed, [16, 32]]):
        with pytest.raises(RuntimeError):
            operators.quantized_linears(x, wrong[0], None, wrong[1], 4, 32, False)
    with pytest.raises(RuntimeError, match="bias has 3"):
        operators.quantized_linears(x, packed, torch.zeros(3), [32, 16], 4, 32, False)
    for weights in ([], [torch.randn(4, 63)], [torch.randn(4, 64).bfloat16()]):
        with pytest.raises(RuntimeError):
            operators.dense_linears(x, weights, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_those_of_float32_rounded_once(instructions: str, dtype: torch.dtype) -> None:
    for shape in ((1, 768), (5, 77), (2, 3, 64), (300, 256)):
        x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
        expected = torch.nn.functional.rms_norm(x.float(), (shape[-1],), weight.float(), 1e-5)
        found = operators.rms_norm(x, weight, 1e-5)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        torch.testing.assert_close(found.float(), expected.to(dtype).float(), atol=1e-6, rtol=1e-5 if dtype ==
                                   torch.float32 else float(torch.finfo(dtype).eps))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_compiler_can_trace_the_operators(bits: int) -> None:
    assert kernels.load() is None
    packed, _ = matrix(48, 64, bits, 32, True)
    torch.library.opcheck(operators.quantized_linear, (torch.randn(3, 64), packed, torch.randn(48), 48, bits, 32, True))
    values = torch.zeros(48, 64 * bits // 8, dtype=torch.uint8)
    torch.library.opcheck(operators.pack_quantized, (values, torch.ones(48, 2).half(), None, 64, bits, 32))
    torch.library.opcheck(operators.unpack_quantized, (packed, 48, 64, bits, 32, True))
    torch.library.opcheck(operators.dense_linear, (torch.randn(9, 8), torch.randn(4, 8), torch.randn(4)))
    keys, values = caches(2, 16, 8, torch.float32)
    torch.library.opcheck(operators.cached_attention, (torch.randn(1, 4, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 8),
                                                       keys, values, torch.tensor([3, 0]), 0.5))
    torch.library.opcheck(operators.dense_linear, (torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16(), None))
    torch.library.opcheck(operators.dense_linears, (torch.randn(2, 8), [torch.randn(4, 8), torch.randn(3, 8)], None))
    torch.library.opcheck(operators.quantized_linears, (torch.randn(3, 64), [packed, packed], None, [48, 48], bits, 32,
                                                        True))
    torch.library.opcheck(operators.rms_norm, (torch.randn(3, 64), torch.randn(64), 1e-5))


def test_blocks_of_next_to_nothing_count_as_zeros(instructions: str) -> None:
    packed, _ = matrix(16, 64, 4, 32, False)
    x = torch.full((2, 64), 1e-38)
    x[1] = 0
    assert not operators.quantized_linear(x, packed, None, 16, 4, 32, False).any()


def test_blocks_that_do_not_fit_are_refused_before_anything_is_read(instructions: str) -> None:
    blocks, values = torch.zeros(3, 20, dtype=torch.uint8), torch.zeros(3, 16, dtype=torch.uint8)
    scales = torch.zeros(3)
    whole = (blocks, "q4_1", values, scales.half(), scales.half())
    operators.take_apart_ggml(*whole)
    for at, wrong in ((0, blocks[:2]), (0, blocks[0]), (0, blocks.int()), (0, blocks.T), (1, "q4_0"), (1, "q9"),
                      (2, values[:2]), (2, values.int()), (2, values[:, ::2]), (3, scales), (3, scales.half()[:2]),
                      (4, None), (4, scales), (4, scales.half()[:2])):
        with pytest.raises(RuntimeError):
            operators.take_apart_ggml(*whole[:at], wrong, *whole[at + 1 :])


def in_new_process(**environment: str) -> str:
    code = "from torchchat_core import kernels; print(kernels.load(False), kernels.load(), kernels.load(False))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PATH": "/usr/bin:/bin", **environment}).stdout.strip()


def test_without_a_compiler_the_reason_is_told(tmp_path: Path) -> None:
    for name, value, expected in (("CXX", "/does/not/exist -O2", "CXX is '/does/not/exist -O2'"),
                                  ("PATH", "/nowhere", "there is no C++ compiler"),
                                  ("TORCHCHAT_CPU_KERNELS", "off", "TORCHCHAT_CPU_KERNELS is off")):
        assert expected in in_new_process(**{"XDG_CACHE_HOME": str(tmp_path), name: value})


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    library = tmp_path / library_path().relative_to(cache_folder().parent)
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    assert in_new_process(XDG_CACHE_HOME=str(tmp_path), CXX="env c++") == "None None None"
    assert library.stat().st_size > 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packed_matrices_give_their_memory_back_when_the_last_of_a_region_is_gone() -> None:
    assert kernels.load() is None

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    values, scales = torch.zeros(1024, 4096, dtype=torch.uint8), torch.ones(1024, 128).half()
    before = resident()
    kept = [operators.pack_quantized(values, scales, None, 4096, 8, 32) for _ in range(32)]
    held = resident() - before
    assert held > 120 << 20
    first = kept[0]
    del kept
    assert first.data_ptr() % 64 == 0
    assert resident() - before < held // 2
