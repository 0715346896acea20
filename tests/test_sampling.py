"""Each function against the plain formula, and the sampler as a whole."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.generation_options import SamplingOptions
from torchchat_core.sampling import (
    Row,
    Sampler,
    add_bias,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_counts,
    penalise_repetition,
    philox_uniform,
)


@pytest.fixture(params=range(4))
def logits(request: pytest.FixtureRequest) -> Row:
    values = np.random.default_rng(request.param).standard_normal(50) * 3
    values[7] = values[21] = values[40]  # equal ones
    return values


def probabilities(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


@pytest.mark.parametrize("k", [1, 2, 3, 10, 49, 50, 1000])
def test_top_k_keeps_the_k_largest_and_the_lower_id_of_equal_ones(logits: Row, k: int) -> None:
    values = logits.tolist()
    order = sorted(range(50), key=lambda index: (-values[index], index))
    assert keep_top_k(logits, k).tolist() == sorted(order[:k])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_shortest_run_that_reaches_p(logits: Row, p: float) -> None:
    chances = probabilities(logits.tolist())
    order = sorted(range(50), key=lambda index: (-logits[index].item(), index))
    expected, total = [], 0.0
    for index in order:
        expected.append(index)
        total += chances[index]
        if total >= p:
            break
    assert keep_top_p(logits, p).tolist() == sorted(expected)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_has_that_share_of_the_highest(logits: Row, p: float) -> None:
    chances = probabilities(logits.tolist())
    expected = [index for index, chance in enumerate(chances) if chance / max(chances) >= p - 1e-12]
    assert keep_min_p(logits, p).tolist() == expected


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(logits: Row) -> None:
    seen = {0, 3, 7, 49}
    expected = [value if index not in seen else value / 1.3 if value > 0 else value * 1.3
                for index, value in enumerate(logits.tolist())]
    penalise_repetition(logits, seen, 1.3)
    assert logits.tolist() == pytest.approx(expected)
    penalise_repetition(logits, set(), 1.3)
    assert logits.tolist() == pytest.approx(expected)


def test_presence_and_frequency_penalties_count_the_answer(logits: Row) -> None:
    counts = {2: 1, 9: 4}
    expected = [value - (0.5 + 0.25 * counts[index] if index in counts else 0)
                for index, value in enumerate(logits.tolist())]
    penalise_counts(logits, counts, 0.5, 0.25)
    assert logits.tolist() == pytest.approx(expected)
    penalise_counts(logits, {}, 0.5, 0.25)
    assert logits.tolist() == pytest.approx(expected)


def test_bias_is_added(logits: Row) -> None:
    before = logits.copy()
    add_bias(logits, {3: 5.0, 8: -100.0})
    assert np.flatnonzero(logits - before).tolist() == [3, 8]
    assert (logits - before)[[3, 8]].tolist() == pytest.approx([5.0, -100.0])
    with pytest.raises(TorchchatError, match="token 50; the vocabulary ends at 49"):
        add_bias(logits, {50: 1.0})


def test_draw_follows_the_inverse_of_the_cumulative_distribution(logits: Row) -> None:
    chances = probabilities(logits.tolist())
    for uniform in [0.0, 0.1, 0.37, 0.5, 0.99, 1 - 2**-53]:
        sums = itertools.accumulate(chances)
        expected = next((token for token, total in enumerate(sums) if total > uniform), 49)
        assert draw(np.exp(logits), uniform) == expected


def test_draw_never_takes_a_token_that_was_ruled_out() -> None:
    weights = [0.0, 1.0, 0.0, 1.0, 0.0]
    assert {draw(np.array(weights), uniform) for uniform in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)} == {1, 3}


def test_philox_gives_the_published_test_vectors() -> None:
    """Random123's kat_vectors for philox4x32-10: the first two words make the number."""
    cases = [
        ((0, 0, 0), (0x6627E8D5, 0xE169C58D)),
        (((1 << 64) - 1,) * 3, (0x408F276D, 0x41C83B0E)),
        ((0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88), (0xD16CFE09, 0x94FDCCEB)),
    ]
    for (seed, stream, step), (low, high) in cases:
        assert philox_uniform(seed, stream, step) == ((high << 32 | low) >> 11) * 2.0**-53


def test_philox_is_uniform_and_its_streams_differ() -> None:
    numbers = [philox_uniform(0, stream, step) for stream in range(20) for step in range(500)]
    assert len(set(numbers)) == len(numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.01)
    tenths = [sum(int(number * 10) == tenth for number in numbers) for tenth in range(10)]
    assert all(900 < count < 1100 for count in tenths)


def test_samples_have_the_frequencies_of_the_softmax_at_the_temperature(logits: Row) -> None:
    options = SamplingOptions(temperature=2.0, seed=1)
    counts = [0] * 50
    sampler = Sampler(options)
    for _ in range(4000):
        counts[sampler.choose(torch.from_numpy(logits))] += 1
    for count, chance in zip(counts, probabilities((logits / 2.0).tolist()), strict=True):
        assert count / 4000 == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 4000) + 1e-3)


def test_the_same_seed_gives_the_same_tokens_and_zero_is_a_seed(logits: Row) -> None:
    def tokens(seed: int | None, stream: int = 0) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed), stream=stream)
        return [sampler.choose(torch.from_numpy(logits)) for _ in range(40)]

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)
    assert tokens(0) != tokens(0, stream=1)
    assert tokens(None) != tokens(None)


def test_temperature_zero_takes_the_lowest_id_of_the_largest(logits: Row) -> None:
    values = torch.from_numpy(logits)
    values[7] = values[21] = 99.0
    assert Sampler(SamplingOptions(temperature=0.0)).choose(values) == 7


def test_penalties_move_a_greedy_choice_on() -> None:
    values = torch.tensor([1.0, 3.0, 2.9])
    sampler = Sampler(SamplingOptions(temperature=0.0, frequency_penalty=0.2))
    assert [sampler.choose(values) for _ in range(4)] == [1, 2, 1, 2]
    assert Sampler(SamplingOptions(temperature=0.0, repetition_penalty=2.0), prompt=[1, 2]).choose(values) == 1
    assert Sampler(SamplingOptions(temperature=0.0, logit_bias={0: 5.0})).choose(values) == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_damaged_logits_are_an_error(poison: float) -> None:
    values = torch.zeros(10)
    values[4] = poison
    for temperature in (0.0, 1.0):
        with pytest.raises(TorchchatError, match="the model returned"):
            Sampler(SamplingOptions(temperature=temperature)).choose(values)


WRONG: list[dict[str, Any]] = [
    {"temperature": math.nan}, {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": "hot"},
    {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.01}, {"min_p": -0.1}, {"min_p": 2}, {"top_k": True},
    {"repetition_penalty": 0.0}, {"presence_penalty": 101.0}, {"frequency_penalty": math.nan}, {"seed": -1},
    {"seed": 1 << 64}, {"logit_bias": {1: math.nan}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {"1": 1.0}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_option_out_of_range_is_refused_with_its_name_and_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(TorchchatError, match=f"{next(iter(wrong))}.*it .*(has to be|maps)"):
        SamplingOptions(**wrong)


def test_a_large_vocabulary_with_every_filter_still_samples() -> None:
    values = torch.randn(128_256, generator=torch.Generator().manual_seed(0))
    options = SamplingOptions(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3)
    chosen = Sampler(options, prompt=random.Random(0).sample(range(128_256), 500)).choose(values)
    assert chosen in values.topk(50).indices.tolist()


@pytest.mark.parametrize("k", [1, 40, 900, 938, 29_999, 30_000])
def test_top_k_of_a_large_vocabulary_is_that_of_sorting_all_of_it(k: int) -> None:
    values = np.random.default_rng(0).standard_normal(30_000) * 2
    values[::3] = values[1::3]  # equal ones
    assert keep_top_k(values, k).tolist() == sorted(np.argsort(-values, kind="stable")[:k].tolist())


@pytest.mark.parametrize("p", [0.3, 0.95, 1 - 1e-6])
def test_top_p_of_a_large_vocabulary_is_that_of_sorting_all_of_it(p: float) -> None:
    values = np.random.default_rng(0).standard_normal(30_000) * 2
    values[::3] = values[1::3]  # equal ones
    chances = np.exp(values - values.max())
    order = np.argsort(-values, kind="stable")
    before = np.concatenate(([0.0], (chances[order] / chances.sum()).cumsum()[:-1]))
    assert keep_top_p(values, p).tolist() == sorted(order[before < p].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampling_takes_no_threads_of_pytorch_and_leaves_the_logits_alone(dtype: torch.dtype) -> None:
    values = torch.randn(128_256, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    options = SamplingOptions(temperature=0.7, top_p=0.9, logit_bias={5: 2.0}, presence_penalty=0.5, seed=3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Sampler(options).choose(values)
    called = {event.key for event in profile.key_averages()}
    views = {"aten::detach", "detach", "aten::to", "aten::resolve_conj", "aten::resolve_neg"}
    converted = {"aten::_to_copy", "aten::empty_strided", "aten::copy_"}
    assert called <= views | (set() if dtype == torch.float32 else converted)
    assert torch.equal(values, before)


def test_the_smallest_temperature_is_greedy() -> None:
    values = torch.tensor([1.0, 5.0, 2.0, 0.0])
    assert {Sampler(SamplingOptions(temperature=1e-310, seed=seed)).choose(values) for seed in range(20)} == {1}
