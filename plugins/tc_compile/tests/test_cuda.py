"""The step that is recorded on a GPU, run here on the CPU: it equals the reference, and traces whole."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tc_compile.cuda import SPARE, GraphDecoder, Replay, compile_layers_for_graphs, compiled_decoder
from tc_eager.executor import EagerModel, EagerSession
from torchchat_core.errors import TorchchatError
from torchchat_core.models.attention import CachedAttention
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import replace_layer
from torchchat_core.quantization.rounding import quantise
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


def test_layers_of_many_mixtures_of_formats_are_compiled() -> None:
    """Each layer has another one, of the same classes: more than the compiler makes of one function."""
    module = seeded(tiny_config(num_layers=10, hidden_size=64))
    forms = [WeightFormat(bits=4, group_size=32), WeightFormat(bits=8), WeightFormat(bits=8, group_size=32),
             WeightFormat(bits=4, group_size=32, asymmetric=True)]
    for index in range(10):
        for name, form in (("gate_proj", forms[index % 4]), ("up_proj", forms[index // 4])):
            place = f"model.layers.{index}.mlp.{name}"
            replace_layer(module, place, "linear:int4", quantise(module.get_submodule(place).weight, form))
    reference = reference_logits(module, (5,))[-1]
    compile_layers_for_graphs(module, "eager")
    torch.testing.assert_close(model(module, Recorder()).session().decode(5), reference, atol=1e-4, rtol=1e-4)


def test_where_nothing_compiles_the_module_is_as_it_was_and_the_reason_is_told() -> None:
    def backend(graph: Any, example: Any) -> Any:
        raise RuntimeError("there is no compiler")

    module = seeded(tiny_config())
    layers = module.model.layers
    with pytest.raises(TorchchatError, match=r"PyTorch cannot compile the layers: RuntimeError: there is no compiler$"):
        compiled_decoder(module, "cpu", backend, Recorder())
    assert module.model.layers is layers


def test_what_is_recorded_at_loading_serves_the_first_sequence() -> None:
    module, recorder = seeded(tiny_config()), Recorder()
    reference = reference_logits(module, PROMPTS[1])
    decoder = compiled_decoder(module, "cpu", "eager", recorder)
    loaded = EagerModel(LoadRequest(device="cpu", dtype="fp32", module=module), CachedAttention, decoder)
    torch.testing.assert_close(run(loaded.session(), PROMPTS[1]), reference, atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("again", [True, False])
def test_a_size_that_could_not_be_recorded_can_be_tried_again(again: bool) -> None:
    module, recorder = seeded(tiny_config(max_context=600)), Recorder()
    decoder = GraphDecoder(module, "cpu", record=lambda step: recorder(step))
    loaded = EagerModel(LoadRequest(device="cpu", dtype="fp32", module=module), CachedAttention, decoder)
    session = loaded.session()
    session.decode(5)
    session.prefill([3] * 300)
    length = session.length
    decoder._record = lambda _: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        session.decode(5)
    assert session.length == length
    decoder._record = recorder
    if again:
        reference = reference_logits(module, (5, *[3] * 300, 5))[-1]
        torch.testing.assert_close(session.decode(5), reference, atol=1e-4, rtol=1e-4)
    del session
    gc.collect()


def test_graphs_run_one_at_a_time_since_they_share_memory() -> None:
    shared = torch.zeros(1, 96)

    class SharingRecorder(Recorder):
        def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
            def replay() -> None:
                shared.copy_(step())
                time.sleep(0.005)  # for the other thread to come in between

            return replay, shared

    module = seeded(tiny_config())
    loaded, found = model(module, SharingRecorder()), dict[int, Tensor]()

    def answer(token: int) -> None:
        found[token] = run(loaded.session(), (token,) * 8)

    threads = [threading.Thread(target=answer, args=(token,)) for token in (5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for token, logits in found.items():
        torch.testing.assert_close(logits, reference_logits(module, (token,) * 8), atol=1e-4, rtol=1e-4)
    assert len(found) == 2
