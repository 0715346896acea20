"""What several tests of the CPU kernels need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchchat_core import kernels


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kind that this processor has, one after the other."""
    assert kernels.load() is None
    try:
        torch.ops.torchchat.use_instructions(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).partition("\n")[0])
    yield request.param
    torch.ops.torchchat.use_instructions("")
