"""KL divergence by hand, and the file that keeps what the reference says."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.measure import divergence
from torchchat_core.measure.divergence import Divergence, DivergenceSum, reference_file
from torchchat_core.measure.perplexity import Block


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(divergence, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def blocks_of(*rows: list[list[float]]) -> list[Block]:
    return [Block(torch.tensor(row, dtype=torch.float64).log(), torch.zeros(len(row), dtype=torch.int64))
            for row in rows]


def divergence_of(reference: list[Block], other: list[Block]) -> Divergence:
    with reference_file(sum(len(block.expected) for block in reference), 2) as file:
        assert list(file.recorded(reference)) == reference
        summed = DivergenceSum(file)
        assert list(summed.observed(other)) == other
        return summed.result


def test_it_is_the_one_computed_by_hand() -> None:
    reference = blocks_of([[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8]])
    other = blocks_of([[0.25, 0.75]], [[0.8, 0.2], [0.2, 0.8]])  # blocks need not be cut at the same places
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    found = divergence_of(reference, other)
    assert found.mean_kl == pytest.approx((first + second + 0) / 3, rel=1e-5)
    assert found.tokens == 3
    assert found.top_1 == pytest.approx(2 / 3)  # a tie counts as the first


def test_a_model_is_not_at_all_apart_from_itself() -> None:
    rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).softmax(-1).tolist()
    found = divergence_of(blocks_of(rows), blocks_of(rows))
    assert (found.mean_kl, found.top_1) == (0.0, 1.0)


def test_tokens_without_probability_in_the_reference_add_nothing() -> None:
    assert divergence_of(blocks_of([[1.0, 0.0]]), blocks_of([[0.5, 0.5]])).mean_kl == pytest.approx(math.log(2))
    assert divergence_of(blocks_of([[1.0, 0.0]]), blocks_of([[1.0, 0.0]])).mean_kl == 0


def test_what_rules_out_what_is_possible_is_refused() -> None:
    with pytest.raises(TorchchatError, match="not finite"):
        divergence_of(blocks_of([[0.5, 0.5]]), blocks_of([[1.0, 0.0]]))


def test_more_positions_than_the_reference_saw_are_refused() -> None:
    with pytest.raises(TorchchatError, match="do not see the same positions"):
        divergence_of(blocks_of([[0.5, 0.5]]), blocks_of([[0.5, 0.5], [0.5, 0.5]]))


def test_several_models_are_compared_with_one_reference() -> None:
    reference, other = blocks_of([[0.5, 0.5]]), blocks_of([[0.25, 0.75]])
    with reference_file(1, 2) as file:
        list(file.recorded(reference))
        found = []
        for _ in range(2):
            summed = DivergenceSum(file)
            list(summed.observed(other))
            found.append(summed.result)
    assert found[0] == found[1]


def test_nothing_is_left_on_disk(cache: Path) -> None:
    with reference_file(1, 2) as file:
        list(file.recorded(blocks_of([[0.5, 0.5]])))
    with pytest.raises(ZeroDivisionError), reference_file(1, 2):
        raise ZeroDivisionError
    assert list(cache.iterdir()) == []


def test_too_little_disk_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(TorchchatError, match=r"need 1 kB in .*; 1 kB are free"), reference_file(10, 30):
        pass
