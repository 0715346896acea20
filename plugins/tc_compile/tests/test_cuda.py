"""The step that is recorded on a GPU, run here on the CPU: it equals the reference, and traces whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tc_compile.cuda import SPARE, GraphDecoder, Replay, compile_layers_for_graphs
from tc_eager.executor import EagerModel, EagerSession
from torchchat_core.models.attention import CachedAttention
from torchchat_core.models.transformer import Transformer
from torchchat_core.specs import LoadRequest
from torchchat_core.testing.models import PROMPTS, VARIANTS, reference_logits, seeded, tiny_config, variant_config


class Recorder:
    """In the place of CUDA graphs: a replay runs the step again, and writes to the same memory."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.recorded += 1
        logits = step().clone()

        def replay() -> None:
            self.replayed += 1
            logits.copy_(step())

        return replay, logits


def model(module: Transformer, recorder: Recorder) -> EagerModel:
    decoder = GraphDecoder(module, "cpu", record=recorder)
    return EagerModel(LoadRequest(device="cpu", dtype="fp32", module=module), CachedAttention, decoder)


def run(session: EagerSession, tokens: tuple[int, ...]) -> Tensor:
    """Logits at every position, each token decoded alone."""
    return torch.stack([session.decode(token) for token in tokens])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_step_gives_the_logits_of_the_reference(variant: str) -> None:
    module = seeded(variant_config(variant))
    for tokens in PROMPTS:
        found = run(model(module, Recorder()).session(), tokens)
        torch.testing.assert_close(found, reference_logits(module, tokens), atol=1e-4, rtol=1e-4)


def test_a_sequence_is_recorded_once_for_each_size_of_its_cache() -> None:
    recorder, tokens = Recorder(), tuple(index % 90 for index in range(300))
    session = model(seeded(tiny_config(max_context=600)), recorder).session()
    run(session, tokens)
    assert (recorder.recorded, recorder.replayed) == (2, 300)


def test_sequences_have_graphs_of_their_own_and_do_not_mix() -> None:
    module = seeded(tiny_config())
    both = model(module, Recorder())
    first, second = both.session(), both.session()
    one, other = PROMPTS[1], PROMPTS[2][: len(PROMPTS[1])]
    pairs = [(first.decode(a), second.decode(b)) for a, b in zip(one, other, strict=True)]
    for found, tokens in zip(zip(*pairs, strict=True), (one, other), strict=True):
        torch.testing.assert_close(torch.stack(found), reference_logits(module, tokens), atol=1e-4, rtol=1e-4)


def test_what_the_memory_held_before_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **more: self.new_full(*args, float("nan"), **more))
    module = seeded(tiny_config())
    found = run(model(module, Recorder()).session(), PROMPTS[1])
    torch.testing.assert_close(found, reference_logits(module, PROMPTS[1]), atol=1e-4, rtol=1e-4)


def test_a_sequence_that_was_cut_goes_on_from_there() -> None:
    module = seeded(tiny_config())
    session = model(module, Recorder()).session()
    session.prefill(PROMPTS[2])
    session.truncate(4)
    expected = reference_logits(module, (*PROMPTS[2][:4], 7))[-1]
    torch.testing.assert_close(session.decode(7), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("variant", "kinds"), [("llama", 1), ("sliding-layers", 2)])
def test_each_kind_of_layer_is_compiled_once_for_all_positions_and_sizes(variant: str, kinds: int) -> None:
    traced: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        traced.append(graph)
        return graph

    tokens, module = PROMPTS[1], seeded(tiny_config(**VARIANTS[variant], max_context=600))
    reference = reference_logits(module, tokens)
    compile_layers_for_graphs(module, backend)
    both = model(module, Recorder())
    for length in (None, 520, 300):
        session = both.session(length)
        if length:
            session.prefill([3] * (length - len(tokens) - 1))
            session.truncate(0)  # the memory stays
        torch.testing.assert_close(run(session, tokens), reference, atol=1e-4, rtol=1e-4)
    assert len(traced) == kinds


def test_a_sequence_that_ends_leaves_its_graph_to_the_next_one() -> None:
    module, recorder = seeded(tiny_config()), Recorder()
    loaded = model(module, recorder)
    for tokens in PROMPTS[1:]:
        session = loaded.session()
        session.prefill(tokens)
        torch.testing.assert_close(session.decode(7), reference_logits(module, (*tokens, 7))[-1], atol=1e-4, rtol=1e-4)
        session.close()
        del session
    assert recorder.recorded == 1


def test_no_more_memory_is_kept_for_sequences_to_come_than_for_two() -> None:
    recorder = Recorder()
    loaded = model(seeded(tiny_config()), recorder)
    for _ in range(2):
        sessions = [loaded.session() for _ in range(4)]
        for session in sessions:
            session.decode(3)
        del sessions, session
    assert recorder.recorded == 4 + (4 - SPARE)


def test_models_are_compiled_however_many_there_were_before() -> None:
    """The compiler counts its work by the code, and gives up at eight."""
    for seed in range(10):
        module = seeded(tiny_config(), seed)
        reference = reference_logits(module, (5,))[-1]
        compile_layers_for_graphs(module, "eager")
        torch.testing.assert_close(model(module, Recorder()).session().decode(5), reference, atol=1e-4, rtol=1e-4)
