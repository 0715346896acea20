"""What exported files count on. Where a test here fails, files that were exported before would compute something else,
or nothing: raise `kernels.INTERFACE`, and write down what is true then."""

from __future__ import annotations

import hashlib

import pytest
import torch

from torchchat_core import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")
# Of programs; and by version, a digest of their schemas.
OPERATORS = ("cached_attention", "decode_token", "dense_linear", "dense_linears", "quantized_linear",
             "quantized_linears", "rms_norm")
SCHEMAS = {2: "13b4e72969a7cafb"}
PACKED = {2: "41a350bd7b872e52"}  # of packed weights


def test_the_operators_of_programs_are_those_of_this_version() -> None:
    schemas = [str(torch._C._get_schema(f"torchchat::{name}", "")) for name in OPERATORS]
    assert hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16] == SCHEMAS[kernels.INTERFACE], schemas


def test_packed_weights_lie_as_in_this_version() -> None:
    digest = hashlib.sha256()
    forms = (4, 96, 32, False), (4, 96, 32, True), (8, 96, 96, False), (8, 64, 32, True)
    for bits, columns, group, asymmetric in forms:
        rows, groups = 33, -(-columns // group)
        values = (torch.arange(rows * columns * bits // 8) * 37 % 251).to(torch.uint8).view(rows, -1)
        scales = torch.linspace(0.5, 2, rows * groups).half().view(rows, groups)
        offsets = -scales if asymmetric else None
        packed = torch.ops.torchchat.pack_quantized(values, scales, offsets, columns, bits, group)
        digest.update(packed.numpy().tobytes())
    assert digest.hexdigest()[:16] == PACKED[kernels.INTERFACE]
