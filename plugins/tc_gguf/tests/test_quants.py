"""tc_gguf.quants: the same numbers as ggml's own code, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tc_gguf.file import TYPES
from tc_gguf.quants import DEQUANTIZERS, dequantizer
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError

SIZES = {kind.name: kind for kind in TYPES.values()}
GOLDEN = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
          "IQ4_XS")


def numbers_of(name: str, blocks: torch.Tensor) -> torch.Tensor:
    numbers = torch.full((len(blocks), SIZES[name].block_elements), torch.nan)
    assert dequantizer(name)(blocks, numbers) is numbers
    return numbers


@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_are_those_of_ggml(testdata: Path, name: str) -> None:
    with np.load(testdata / "golden" / "ggml_quant_vectors.npz") as golden:
        packed, wanted = torch.from_numpy(golden[f"q_{name}"]), golden[f"dq_{name}"]
    unpacked = numbers_of(name, packed.view(-1, SIZES[name].block_bytes)).view(wanted.shape)
    assert unpacked.numpy().tobytes() == wanted.astype("<f4").tobytes()


@pytest.mark.parametrize("name", DEQUANTIZERS)
def test_any_bytes_give_what_the_gguf_package_gives(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    packed = np.random.default_rng(1).integers(0, 256, (3000, SIZES[name].block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]).reshape(3000, -1)
    unpacked = numbers_of(name, torch.from_numpy(packed)).numpy()
    assert unpacked.dtype == np.float32
    same = (unpacked.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(unpacked) & np.isnan(wanted))
    assert same.all()


@pytest.mark.parametrize("name", DEQUANTIZERS)
def test_the_bytes_that_are_unpacked_stay_as_they_are(name: str) -> None:
    packed = torch.randint(0, 256, (64, SIZES[name].block_bytes), dtype=torch.uint8)
    before = packed.clone()
    numbers_of(name, packed)
    assert torch.equal(packed, before)


@pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("instructions", ["portable", "avx2"])
@pytest.mark.parametrize("name", kernels.GGML_FORMATS)
def test_kernels_give_the_same_bits(name: str, instructions: str) -> None:
    try:
        torch.ops.torchchat.use_instructions(instructions)
    except RuntimeError as error:
        pytest.skip(str(error).partition("\n")[0])
    kind = SIZES[name]
    packed = torch.randint(0, 256, (3001, kind.block_bytes), dtype=torch.uint8)
    wanted = numbers_of(name, packed)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = torch.empty(wanted.shape, dtype=dtype)
            torch.ops.torchchat.unpack_ggml(packed, name, found)
            assert torch.equal(found.nan_to_num(1, 2, 3), wanted.to(dtype).nan_to_num(1, 2, 3))
        for blocks, out in ((packed[:, :-1].contiguous(), wanted), (packed, wanted[:-1]), (packed, wanted.double())):
            with pytest.raises(RuntimeError):
                torch.ops.torchchat.unpack_ggml(blocks, name, out)
    finally:
        torch.ops.torchchat.use_instructions("")


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S", "Q8_1", "TQ1_0", "I32", "F64"])
def test_types_that_are_not_read_are_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(TorchchatError, match=f"type {name} are not read; known are .*Q4_K") as caught:
        dequantizer(name)
    assert "Q8_0" in str(caught.value.fix)


def test_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for number, kind in TYPES.items():
        if kind.name != "Q8_1":  # gguf has an old layout; the type is of activations and in no file
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.block_elements, kind.block_bytes)
            assert gguf.GGMLQuantizationType(number).name == kind.name
