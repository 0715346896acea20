"""The models that sessions are tested with: which, where, in what, and what they have to agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from torchchat_core.models.transformer import Transformer
from torchchat_core.pipeline import has_device
from torchchat_core.specs import LoadedModel, Session
from torchchat_core.testing.demands import demand
from torchchat_core.testing.models import reference_logits

Test = TypeVar("Test", bound=Callable[..., None])


def everywhere(test: Test) -> Test:
    """Has a test run for every variant, device and dtype, and not only for the first variant in the best dtype."""
    test.everywhere = True  # type: ignore[attr-defined]
    return test


@dataclass(frozen=True)
class Case:
    """One model to load: which, where, and in what."""

    variant: str
    device: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.variant}-{self.device}-{self.dtype}"


@dataclass(frozen=True)
class Running:
    """A loaded model, and the reference for it: the same weights as float32."""

    case: Case
    model: LoadedModel
    reference: Transformer
    tolerance: float

    def expected(self, tokens: Sequence[int], session: Session) -> Tensor:
        """Logits [n, vocab] that the session has to give at each of the tokens, if it holds nothing before them."""
        return reference_logits(self.reference, tokens, session.limit)

    def compare(self, given: Tensor, expected: Tensor, what: str, mend: str) -> None:
        """Demands that logits agree within the tolerance, relative to the largest of those expected."""
        __tracebackhide__ = True
        demand(given.shape == expected.shape, f"{what}: logits of shape {list(given.shape)} instead of "
               f"{list(expected.shape)}", "return logits [vocab] of the last position, without a batch dimension")
        error = float((given - expected).abs().max() / expected.abs().max())
        demand(error <= self.tolerance, f"{what} ({self.case}): logits are off by {error:.2g} of the largest one; "
               f"{self.tolerance:.2g} is permitted", mend)


class FewThreads:
    """A part of the contracts that compute."""

    threads = 1  # that PyTorch computes with during the tests

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def few_threads(cls) -> Iterator[None]:
        """Tiny models gain nothing from more threads, and lose much where other programs want the processor."""
        before = torch.get_num_threads()
        torch.set_num_threads(cls.threads)
        yield
        torch.set_num_threads(before)


def device_parameter(device: str, value: object = None) -> Any:
    """A parameter of tests that are skipped where this machine lacks the device; the device itself without `value`."""
    marks = () if has_device(device) else (pytest.mark.skip(reason=f"this machine has no {device}"),)
    parameter = device if value is None else value
    return pytest.param(parameter, id=str(parameter), marks=marks)
