"""The C++ sampler draws the tokens that the Python one draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from probing import Probe, ProbeError

from torchchat_core.generation import StopMatcher
from torchchat_core.generation_options import SamplingOptions
from torchchat_core.sampling import Sampler, philox_uniform

SEEDS = [*range(200), (1 << 64) - 1]
STEPS, VOCAB = 6, 1000
PROMPT = [3, 14, 159, 26, 535]


def logits() -> torch.Tensor:
    found = 4 * torch.randn(STEPS, VOCAB, generator=torch.Generator().manual_seed(7))
    found[1, 100:200] = found[1].max()  # equal ones
    found[2, 5] = -torch.inf
    found[3] = 0.0
    return found


@pytest.mark.parametrize("options", [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 40}, {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.05}, {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 1e-6},
    {"temperature": 100.0, "top_k": 150, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 0.8},
])
def test_the_ids_of_two_hundred_seeds_are_those_of_python(options: dict[str, Any], tmp_path: Path,
                                                                probe: Probe) -> None:
    rows = logits()
    (tmp_path / "logits").write_bytes(rows.numpy().tobytes())
    expected = []
    for seed in SEEDS:
        sampler = Sampler(SamplingOptions(seed=seed, **options), PROMPT, stream=2)
        expected.append([sampler.choose(row) for row in rows])
    assert probe.ask("sample", logits=str(tmp_path / "logits"), vocab=VOCAB, seeds=SEEDS, stream=2, prompt=PROMPT,
                     **options) == expected


@pytest.mark.parametrize(("seed", "stream", "step"), [(0, 0, 0), (42, 0, 7), ((1 << 64) - 1, 1 << 40, 1 << 33)])
def test_the_random_numbers_are_those_of_the_specification(seed: int, stream: int, step: int, probe: Probe) -> None:
    assert probe.ask("uniform", seed=seed, stream=stream, step=step) == philox_uniform(seed, stream, step)


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path, probe: Probe) -> None:
    for value in (torch.nan, torch.inf):
        rows = torch.zeros(1, 10)
        rows[0, 4] = value
        (tmp_path / "logits").write_bytes(rows.numpy().tobytes())
        with pytest.raises(ProbeError, match="highest logit"):
            probe.ask("sample", logits=str(tmp_path / "logits"), vocab=10, seeds=[1], stream=0, prompt=[])


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0.0},
                                     {"top_k": -1}])
def test_options_out_of_range_are_refused(options: dict[str, float], tmp_path: Path, probe: Probe) -> None:
    (tmp_path / "logits").write_bytes(torch.zeros(1, 10).numpy().tobytes())
    with pytest.raises(ProbeError, match=next(iter(options))):
        probe.ask("sample", logits=str(tmp_path / "logits"), vocab=10, seeds=[1], stream=0, prompt=[], **options)


@pytest.mark.parametrize("stops", [["\nUser:"], ["abab", "b\u00e9"], ["x"], []])
def test_stop_strings_are_held_back_as_in_python(stops: list[str], probe: Probe) -> None:
    for texts in (["ab", "aba", "b", "c"], ["\nUs", "er", "!\nUser", ": no"], ["a", "b\u00e9", "d"], ["ab"]):
        matcher, expected = StopMatcher(stops), []
        for text in texts:
            expected.append(matcher.push(text))
            if matcher.found:
                break
        else:
            expected.append(matcher.finish())
        assert probe.ask("stop", stops=stops, texts=texts) == expected
