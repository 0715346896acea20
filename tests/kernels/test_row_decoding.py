"""Tokens of several sequences in one call: every row is what its sequence gets alone, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from torchchat_core import kernels
from torchchat_core.kernels.layers import use_kernel_linear
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.quantization.running import prepare
from torchchat_core.testing.models import seeded, tiny_config

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the CPU kernels cannot be built here")


def decoder(module: Transformer) -> Any:
    from torchchat_core.kernels.decoding import TokenDecoder

    prepare(module, module.model.norm.weight.dtype)
    use_kernel_linear(module)
    return TokenDecoder.of(module)


def alone_and_together(module: Transformer, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the same next tokens of sequences of so many tokens, one by one and in one call, twice each."""
    found, dtype = decoder(module), module.model.norm.weight.dtype
    both = []
    for together in (False, True):
        caches = [KVCache(module.config, 600, dtype, torch.device("cpu")) for _ in counts]
        for row, (cache, count) in enumerate(zip(caches, counts, strict=True)):
            for at in range(count):
                found.logits((5 * at + row) % 96, cache, False)
                cache.advance(1)
        steps = []
        for step in range(2):
            tokens = [(11 * row + step) % 96 for row in range(len(counts))]
            steps.append(found.logits_of_rows(tokens, caches, False) if together else torch.cat(
                [found.logits(token, cache, False) for token, cache in zip(tokens, caches, strict=True)]))
            for cache in caches:
                cache.advance(1)
        both.append(torch.cat(steps))
    return both[0], both[1]


@pytest.mark.parametrize("changes", [
    {}, {"rope_interleaved": True, "qk_norm": True}, {"attention_bias": True, "mlp_bias": True},
    {"sliding_window": 6, "sliding_layers": (True, False), "num_kv_heads": 1},
    {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_divisor": 4.0, "intermediate_size": 40},
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_what_they_are_alone(instructions: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    module = seeded(tiny_config(**changes)).to(dtype)
    for counts in ([0, 1], [3, 0, 17, 9, 1, 2, 30, 5]):
        alone, together = alone_and_together(module, counts)
        assert torch.equal(alone, together)
        assert len(set(alone[:, 0].tolist())) == len(alone)  # rows that differ: none was computed for another


@pytest.mark.parametrize("group_size", [None, 32])
def test_rows_of_a_quantised_embedding_are_what_they_are_alone(group_size: int | None) -> None:
    module = seeded(tiny_config(hidden_size=40))  # which groups of 32 do not divide
    quantise_layers(module, "embedding:int4", WeightFormat(bits=4, group_size=group_size))
    alone, together = alone_and_together(module, [3, 0, 9])
    assert torch.equal(alone, together)


def prompts_and_tokens(module: Transformer, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits behind prompts of such lengths, and of the token behind each: token by token, and in one call for all.

    The last prompt stands behind 5 tokens.
    """
    found, dtype = decoder(module), module.model.norm.weight.dtype
    prompts = [[(7 * at + row) % 96 for at in range(length)] for row, length in enumerate(lengths)]
    both = []
    for together in (False, True):
        caches = [KVCache(module.config, 600, dtype, torch.device("cpu")) for _ in prompts]
        for token in range(5):
            found.logits(token, caches[-1], False)
            caches[-1].advance(1)
        if together:
            rows = [found.logits_of_prompts(prompts, caches, False)]
            for prompt, cache in zip(prompts, caches, strict=True):
                cache.advance(len(prompt))
        else:
            rows = []
            for prompt, cache in zip(prompts, caches, strict=True):
                for token in prompt:
                    last = found.logits(token, cache, False)
                    cache.advance(1)
                rows.append(last)
        both.append(torch.cat([*rows, *(found.logits(3, cache, False) for cache in caches)]))
    return both[0], both[1]


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": True, "sliding_window": 6, "sliding_layers": (True, False)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[9, 1, 14, 3, 8, 20, 2], [16]], ids=str)
def test_prompts_are_what_their_tokens_are_one_by_one(changes: dict[str, Any], dtype: torch.dtype, lengths: list[int]
                                                      ) -> None:
    one_by_one, together = prompts_and_tokens(seeded(tiny_config(**changes)).to(dtype), lengths)
    assert torch.equal(one_by_one, together)
    assert len(set(together[:, 0].tolist())) == len(together)


@pytest.mark.parametrize(("lengths", "hidden", "layers"), [
    ([5, 9, 3, 12, 7, 16, 1], 256, 4), ([9], 1024, 2), ([2, 3], 1024, 2), ([9, 14, 3, 16, 4], 1024, 2)], ids=str)
def test_threads_change_nothing_of_prompts(lengths: list[int], hidden: int, layers: int) -> None:
    module, before = seeded(tiny_config(hidden_size=hidden, intermediate_size=2 * hidden, num_layers=layers,
                                        vocab_size=2048)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(*prompts_and_tokens(module, lengths))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", [WeightFormat(bits=4, group_size=32), WeightFormat(bits=8),
                                  WeightFormat(bits=4, group_size=32, asymmetric=True)], ids=str)
def test_quantised_rows_are_what_they_are_alone(instructions: str, form: WeightFormat) -> None:
    module = seeded(tiny_config())
    quantise_layers(module, "linear:int4", form)
    alone, together = alone_and_together(module, [3, 0, 17, 9, 1, 2, 30, 5, 4, 4, 4, 6, 7, 8, 9])
    assert torch.equal(alone, together)


@pytest.mark.parametrize(("rows", "hidden", "layers"), [
    (40, 256, 4), (1, 1024, 2), (2, 1024, 2), (3, 1024, 2), (36, 1024, 2),
], ids=["in groups", "one", "few", "together, as the weights are large", "a group for each thread"])
def test_threads_change_nothing(rows: int, hidden: int, layers: int) -> None:
    """Sizes at which `row_decoding.cpp` takes each of its ways; most machines have fewer cores than eight threads, so
    that some are late for every stage."""
    config = tiny_config(hidden_size=hidden, intermediate_size=2 * hidden, num_layers=layers, vocab_size=2048)
    module, before = seeded(config), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            found.append(alone_and_together(module, [row % 5 for row in range(rows)]))
    finally:
        torch.set_num_threads(before)
    for alone, together in found:
        assert torch.equal(alone, found[0][0])
        assert torch.equal(together, alone)


def test_models_that_decode_at_once_and_go_away_do_not_disturb_each_other() -> None:
    """Threads that are late may still be in a decoder when its token is done, or look for the next model's work."""
    config, before = tiny_config(hidden_size=512, intermediate_size=1024, vocab_size=2048), torch.get_num_threads()
    expected = [alone_and_together(seeded(config, seed), [1, 3])[0] for seed in range(2)]

    def again(seed: int) -> bool:
        return all(torch.equal(alone_and_together(seeded(config, seed), [1, 3])[0], expected[seed]) for _ in range(8))

    try:
        torch.set_num_threads(8)
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(again, range(2))) == [True, True]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wrong", ["token", "negative", "angles", "number", "layers", "held", "far", "counts", "none",
                                   "room", "more"])
def test_rows_that_do_not_fit_are_refused(wrong: str) -> None:
    module = seeded(tiny_config())
    config, run = module.config, decoder(module)._decoder.run_rows

    def cache(layers: int) -> Any:
        rooms = [torch.zeros(config.num_kv_heads, 8, config.head_dim) for _ in range(2 * layers)]
        return torch.classes.torchchat.Cache(rooms[:layers], rooms[layers:])

    caches = [cache(config.num_layers), cache(config.num_layers), cache(config.num_layers - 1)]
    first, second, short = [each.number() for each in caches]
    angles = torch.zeros(8, 1, config.head_dim)
    given = {"embedding": torch.zeros(5, config.hidden_size), "tokens": [4, 0], "multiplier": 1.0, "cos": angles,
             "sin": angles, "caches": [first, second], "counts": [1, 1], "held": [0, 3]}
    run(*given.values())
    given |= {"token": {"tokens": [4, 5]}, "negative": {"tokens": [-1, 0]}, "angles": {"cos": angles[:3]},
              "number": {"caches": [first, 1 << 60]}, "layers": {"caches": [first, short]}, "held": {"held": [0, 8]},
              "far": {"held": [0, 1 << 62]}, "counts": {"counts": [1, 2]}, "none": {"counts": [2, 0]},
              "room": {"counts": [2, 1], "tokens": [0, 1, 2], "held": [7, 3]}, "more": {"tokens": [0, 1, 2]}}[wrong]
    with pytest.raises(RuntimeError):
        run(*given.values())


def test_a_cache_of_rooms_that_differ_is_refused() -> None:
    rooms = [torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)]
    for wrong in (torch.zeros(2, 9, 4), torch.zeros(2, 8, 4, dtype=torch.bfloat16),
                  torch.zeros(8, 2, 4).transpose(0, 1), torch.zeros(2, 8)):
        with pytest.raises(RuntimeError, match="a cache of"):
            torch.classes.torchchat.Cache(rooms, [rooms[0], wrong])
    with pytest.raises(RuntimeError, match="keys of 2 layers and values of 1"):
        torch.classes.torchchat.Cache(rooms, rooms[:1])


def test_a_cache_that_is_gone_is_not_written_to() -> None:
    module = seeded(tiny_config())
    found = decoder(module)
    cache = KVCache(module.config, 600, torch.float32, torch.device("cpu"))
    expected = found.logits(1, cache, False)
    gone = cache.all_rooms_as(lambda *_: None, 1).number  # what C++ knows it by
    cache.release()
    angles = found._angles.up_to(1, False)
    with pytest.raises(RuntimeError, match="there is no cache"):
        found._decoder.run_rows(found._table, [1], 1.0, *angles, [gone], [1], [0])
    assert torch.equal(found.logits(1, cache, False), expected)
