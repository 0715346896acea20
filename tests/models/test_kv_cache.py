"""The cache grows with the sequence, and neither memory nor attention depends on what it could hold."""

from __future__ import annotations

import pytest
import torch

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import FIRST_CAPACITY, KVCache

CONFIG = ModelConfig(architecture="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2,
                     num_kv_heads=1, head_dim=4, max_context=1 << 20)


def cache(limit: int) -> KVCache:
    return KVCache(CONFIG, limit, torch.float32, torch.device("cpu"))


def rows(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count).float()[:, None, None].expand(count, 1, 4)


def append(target: KVCache, count: int) -> torch.Tensor:
    first = target.length
    keys = [target.write(layer, rows(count, first), -rows(count, first))[0] for layer in range(2)]
    target.advance(count)
    return keys[1]


def test_memory_is_taken_for_what_is_held_not_for_what_could_be() -> None:
    small, large = cache(512), cache(1 << 20)
    assert large.bytes_held() == 0
    append(small, 300)
    append(large, 300)
    assert small.bytes_held() == large.bytes_held() == 2 * 2 * 512 * 4 * 4


def test_attention_sees_the_used_part_alone() -> None:
    held = cache(8192)
    assert append(held, 5).shape == (1, 5, 4)
    assert append(held, 1).shape == (1, 6, 4)


def test_growing_keeps_what_is_held() -> None:
    held = cache(5000)
    for count in (1, FIRST_CAPACITY - 1, 1, 700, 3000):
        keys = append(held, count)
    assert torch.equal(keys[0, :, 0], torch.arange(held.length).float())


def test_what_was_forgotten_is_written_over() -> None:
    held = cache(100)
    append(held, 10)
    held.truncate(4)
    keys, values = held.write(0, torch.full((1, 1, 4), 9.0), torch.zeros(1, 1, 4))
    assert keys[0, :, 0].tolist() == [0, 1, 2, 3, 9]
    assert values[0, :, 0].tolist() == [0, -1, -2, -3, 0]


def test_a_step_that_was_not_finished_is_as_if_it_had_not_begun() -> None:
    held = cache(100)
    append(held, 3)
    held.write(0, rows(5), rows(5))  # the other layer never came
    assert append(held, 1)[0, :, 0].tolist() == [0, 1, 2, 3]


def test_the_limit_and_wrong_lengths_are_errors() -> None:
    held = cache(4)
    append(held, 4)
    with pytest.raises(TorchchatError, match="would have 5 tokens; the limit is 4"):
        append(held, 1)
    for length in (-1, 5):
        with pytest.raises(TorchchatError, match=f"cannot cut a sequence of 4 tokens to {length}"):
            held.truncate(length)


def test_memory_is_wrapped_again_only_where_it_is_other_memory() -> None:
    made: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def wrap(keys: list[torch.Tensor], values: list[torch.Tensor]) -> int:
        made.append((list(keys), list(values)))
        return len(made)

    held = cache(5000)
    assert [held.all_rooms_as(wrap, 1), held.all_rooms_as(wrap, FIRST_CAPACITY)] == [1, 1]
    append(held, FIRST_CAPACITY)
    assert held.all_rooms_as(wrap, 0) == 1
    copied = held.copy(3)
    assert copied.all_rooms_as(wrap, 0) == 2
    assert held.all_rooms_as(wrap, 1) == 3  # it has grown
    held.move_to([torch.zeros(1, 600, 4)] * 2, [torch.zeros(1, 600, 4)] * 2)
    assert held.all_rooms_as(wrap, 1) == 4
    held.release()
    assert held.all_rooms_as(wrap, 1) == 5
    for index, shape in enumerate([FIRST_CAPACITY, 3, 2 * FIRST_CAPACITY, 600, FIRST_CAPACITY]):
        assert {tuple(each.shape) for both in made[index] for each in both} == {(1, shape, 4)}


def test_memory_that_could_not_be_had_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    held, grown, calls = cache(5000), KVCache._grown, 0

    def failing(self: KVCache, old: torch.Tensor, capacity: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # the values of the last layer
            raise RuntimeError("no memory")
        return grown(self, old, capacity)

    monkeypatch.setattr(KVCache, "_grown", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        held.all_rooms(1)
    keys, values = held.all_rooms(1)
    assert {each.shape for each in (*keys, *values)} == {(1, FIRST_CAPACITY, 4)}


def test_releasing_gives_the_memory_back() -> None:
    held = cache(100)
    append(held, 50)
    held.release()
    assert (held.bytes_held(), held.length) == (0, 0)
