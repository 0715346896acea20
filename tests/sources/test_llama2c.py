"""llama2.c's .bin files hold what its .pt file holds, and damaged ones are told apart."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.sources import llama2c
from torchchat_core.sources.containers import read_container

FOLDER = "tinyllamas/stories260K"
SIZES = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 20, "max_seq_len": 8}


def tensors_of(path: Path) -> dict[str, Tensor]:
    tensors = read_container(path, safetensors=False).tensors
    return {name.removeprefix("_orig_mod."): stored.read() for name, stored in tensors.items()}


@pytest.mark.parametrize("file", ["stories260K.bin", "stories260K.v1.bin"])
def test_the_tensors_are_those_of_the_pt_file(file: str, testdata: Path) -> None:
    expected, found = tensors_of(testdata / FOLDER / "stories260K.pt"), tensors_of(testdata / FOLDER / file)
    assert found.keys() - {"freqs_cos", "freqs_sin"} == expected.keys() - {"output.weight"}  # the two are one
    for name in found.keys() & expected.keys():
        assert torch.equal(found[name], expected[name])


def version_2(path: Path, group: int, shared: bool) -> dict[str, Tensor]:
    """Writes a file of version 2 with random weights; what it holds."""
    held = {}
    with path.open("wb") as file:
        header = llama2c.MAGIC + struct.pack("<i7iBi", 2, *SIZES.values(), shared, group)
        file.write(header.ljust(256, b"\0"))
        for name, shape in llama2c._marked_order(SIZES, shared):
            if len(shape) == 1:
                held[name] = torch.randn(shape)
                file.write(held[name].numpy().tobytes())
            else:
                values = torch.randint(-127, 128, shape, dtype=torch.int8)
                scales = torch.rand(values.numel() // group, 1)
                held[name] = (values.view(-1, group).float() * scales).view(shape)
                file.write(values.numpy().tobytes() + scales.numpy().tobytes())
    return held


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("group", [8, 2])
def test_version_2_is_read_with_its_scales(group: int, shared: bool, tmp_path: Path) -> None:
    expected = version_2(tmp_path / "model.bin", group, shared)
    found = tensors_of(tmp_path / "model.bin")
    assert ("output.weight" in found) is not shared
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name])


def test_a_legacy_file_with_an_output_matrix_of_its_own_has_a_negative_vocabulary(tmp_path: Path) -> None:
    floats = sum(torch.Size(shape).numel() for _, shape in llama2c._legacy_order(SIZES, shared=False))
    values = torch.arange(floats, dtype=torch.float32)
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<7i", *{**SIZES, "vocab_size": -20}.values()) + values.numpy().tobytes())
    found = tensors_of(path)
    assert torch.equal(found["output.weight"], values[-20 * 16:].view(20, 16))
    assert read_container(path, safetensors=False).model_args == SIZES


@pytest.mark.parametrize(("at", "value", "message"), [
    (4, 3, "of version 3"),
    (8, 0, "dim is 0"),
    (8, 1 << 30, "dim is 1073741824"),
    (16, 100000, "n_layers is 100000"),
    (20, 5, "n_heads is 5"),
    (24, 3, "n_kv_heads is 3"),
    (28, -20, "vocab_size is -20"),
    (28, 21, "bytes; its header asks for"),
    (37, 0, "the group size is 0"),
    (37, 3, "the group size is 3"),
])
def test_headers_that_cannot_be_are_named(at: int, value: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    version_2(path, 8, shared=True)
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, at, value)
    path.write_bytes(content)
    with pytest.raises(TorchchatError) as raised:
        read_container(path, safetensors=False)
    assert message in raised.value.message


@pytest.mark.parametrize("cut", [100, -1])
def test_a_file_that_was_cut_off_is_named(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    version_2(path, 8, shared=True)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TorchchatError, match=r"model\.bin (ends within its header|has \d+ bytes)"):
        read_container(path, safetensors=False)


def test_a_file_without_the_mark_and_of_another_size_is_no_file_of_llama2c(testdata: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes((testdata / FOLDER / "stories260K.bin").read_bytes()[:-4])
    assert llama2c.read_header(path) is None
    with pytest.raises(TorchchatError, match="as a PyTorch checkpoint"):
        read_container(path, safetensors=False)
