"""What the compiling executor adds: graphs that are shared, kept and found again, and a way out where there is none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tc_compile import compiling, executor, graphs
from tc_compile.executor import CompileExecutor
from tc_compile.graphs import LayerGraph, find_graph, graph_folder
from tc_compile.layers import CompiledStack
from tc_compile.signature import LayerSignature
from tc_eager.executor import EagerModel
from torchchat_core import kernels
from torchchat_core.kernels.layers import use_kernel_linear
from torchchat_core.models.transformer import Transformer
from torchchat_core.quantization.layers import QuantizedLinear, WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.quantization.running import fastest
from torchchat_core.specs import LoadRequest
from torchchat_core.testing.models import PROMPTS, reference_logits, seeded, tiny_config

compiles = pytest.mark.skipif(not kernels.available(), reason="there is no compiler")


def load(module: Transformer) -> EagerModel:
    return CompileExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=module))


def signature(**changes: Any) -> LayerSignature:
    module = seeded(tiny_config(**changes))
    use_kernel_linear(module)
    return LayerSignature(module.model.layers[0], module.config.attention_scale)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder without compiled layers."""
    assert kernels.load() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "torchchat" / "compiled"


@pytest.fixture
def never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling raises what a broken compiler might."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("the compiler broke\nand said more")

    monkeypatch.setattr(compiling, "_trace", fail)


def graphs_of(model: EagerModel) -> list[LayerGraph]:
    """Of each layer, where the layers are compiled."""
    stacks = [module for module in model.module.model.layers if isinstance(module, CompiledStack)]
    return [run.__self__ for stack in stacks for _, run, _ in stack.steps]  # type: ignore[attr-defined]


# ---- graphs -------------------------------------------------------------------------------------------------------


@compiles
def test_layers_that_are_alike_share_one_graph_whatever_their_windows() -> None:
    found = graphs_of(load(seeded(tiny_config(sliding_window=6, sliding_layers=(True, False)))))
    assert len(found) == 2
    assert len({id(graph) for graph in found}) == 1


@compiles
def test_hidden_states_may_lie_in_wider_rows() -> None:
    """Embeddings in groups that do not fill their rows give such ones; compiled code looks at addresses alone."""

    class Wide(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.nn.functional.pad(super().forward(tokens), (0, 3))[:, :-3]

    module = seeded(tiny_config())
    expected = reference_logits(module, PROMPTS[1])
    plain = module.model.embed_tokens
    module.model.embed_tokens = Wide(plain.num_embeddings, plain.embedding_dim, _weight=plain.weight)
    torch.testing.assert_close(load(module).session().score(PROMPTS[1]), expected, atol=1e-4, rtol=1e-4)


@compiles
def test_one_graph_serves_every_length_and_every_growth_of_the_cache() -> None:
    config = tiny_config(max_context=700)
    model = load(seeded(config))
    model._decoder = None  # which would take the single tokens
    tokens = [(7 * i) % 96 for i in range(530)]
    expected = reference_logits(seeded(config), tokens)
    session = model.session()
    first = session.score(tokens[:250])
    torch.testing.assert_close(first, expected[:250], atol=1e-4, rtol=1e-4)
    for position in range(250, 265):
        torch.testing.assert_close(session.decode(tokens[position]), expected[position], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(session.score(tokens[265:]), expected[265:], atol=1e-4, rtol=1e-4)
    session.truncate(520)
    torch.testing.assert_close(session.decode(tokens[520]), expected[520], atol=1e-4, rtol=1e-4)


@compiles
def test_a_second_start_loads_what_was_compiled_without_the_compiler() -> None:
    load(seeded(tiny_config()))
    code = (
        "import sys\n"
        "from tc_compile.executor import CompileExecutor\n"
        "from torchchat_core.specs import LoadRequest\n"
        "from torchchat_core.testing.models import seeded, tiny_config\n"
        "module = seeded(tiny_config())\n"
        "model = CompileExecutor().load(LoadRequest(device='cpu', dtype='fp32', module=module))\n"
        "model.session().prefill([1, 2, 3])\n"
        "print(type(module.model.layers[0]).__name__, *sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & "
        "sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    imported_by_the_tests = {"torch._dynamo", "torch._inductor", "sympy"}
    assert done.stdout.split()[0] == "CompiledStack"
    assert not imported_by_the_tests & set(done.stdout.split())
    assert done.stderr == ""


@compiles
def test_the_key_tells_apart_what_another_graph_is_needed_for() -> None:
    plain = signature()
    assert signature().key == plain.key
    assert signature(num_layers=1, vocab_size=50, sliding_window=3).key == plain.key
    for change in ({"hidden_size": 40}, {"norm_eps": 1e-3}, {"attention_bias": True}, {"rope_interleaved": True},
                   {"residual_multiplier": 0.5}, {"attention_multiplier": 0.2}, {"qk_norm": True}):
        assert signature(**change).key != plain.key, change


def test_layers_that_are_alike_have_one_key_whatever_multiplies_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(form: WeightFormat, with_kernels: bool) -> str:
        layer = seeded(tiny_config(hidden_size=64, intermediate_size=64, head_dim=16)).model.layers[0]
        quantise_layers(layer, "linear:int4", form)
        for name, each in list(layer.named_modules()):
            if isinstance(each, QuantizedLinear):
                layer.set_submodule(name, fastest(each, torch.bfloat16, with_kernels))
        return LayerSignature(layer, 1.0).key

    for form in (WeightFormat(bits=4, group_size=32), WeightFormat(bits=8)):
        for with_kernels in (False, kernels.available()):
            assert key(form, with_kernels) == key(form, with_kernels), (form, with_kernels)


class Chooses(nn.Module):
    """A product that goes one way for few rows and another one for many."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= 2:
            return torch.ops.torchchat.dense_linear(x, self.weight, None)
        return x @ self.weight.T


@compiles
def test_a_layer_that_chooses_by_the_number_of_rows_is_compiled_for_one() -> None:
    module = seeded(tiny_config())
    for layer in module.model.layers:
        layer.mlp.up_proj = Chooses(layer.mlp.up_proj)
    model = load(module)
    assert all(graph.one_row for graph in graphs_of(model))
    tokens = [*PROMPTS[1], 9, 8, 7]
    expected = reference_logits(seeded(tiny_config()), tokens)
    session = model.session()
    session.prefill(tokens[:-2])
    for position in (-2, -1):
        torch.testing.assert_close(session.decode(tokens[position]), expected[position], atol=1e-4, rtol=1e-4)


# ---- without them -------------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def demand_eager(model: EagerModel) -> None:
    assert not graphs_of(model)
    module = seeded(tiny_config())
    tokens = list(PROMPTS[1])
    torch.testing.assert_close(model.session().score(tokens), reference_logits(module, tokens), atol=1e-5, rtol=1e-4)


def test_without_the_kernels_it_runs_as_eager_does_and_says_why(monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(executor.kernels, "load", lambda *_, **__: "there is no C++ compiler")
    demand_eager(load(seeded(tiny_config())))
    assert told(caplog) == ["not compiled, run operation by operation: there is no C++ compiler"]


@compiles
def test_where_compiling_fails_it_runs_as_eager_does_and_says_why(empty_cache: Path, never_compiled: None,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    demand_eager(load(seeded(tiny_config())))
    assert told(caplog) == ["not compiled, run operation by operation: PyTorch cannot compile the layers: the compiler "
                            "broke"]
    assert list(empty_cache.iterdir()) == []


@compiles
def test_a_damaged_library_is_told_and_not_loaded(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = graph_folder(signature().key)
    folder.mkdir(parents=True)
    (folder / "layer.so").write_bytes(b"no library")
    demand_eager(load(seeded(tiny_config())))
    assert str(folder) in told(caplog)[0]
    assert "delete the folder" in told(caplog)[0]


@compiles
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "torchchat").write_text("a file where the folder would be")
    assert kernels.load() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    demand_eager(load(seeded(tiny_config())))
    assert "compiled layers cannot be kept" in told(caplog)[0]


class Sealed(Tensor):
    """A tensor whose values only its own class reads, as quantising libraries make them."""


@compiles
def test_weights_of_an_unknown_kind_are_left_to_eager(caplog: pytest.LogCaptureFixture) -> None:
    module = seeded(tiny_config())
    module.model.layers[0].input_layernorm.register_buffer("extra", torch.zeros(1).as_subclass(Sealed))
    demand_eager(load(module))
    assert "'input_layernorm.extra' is a Sealed on cpu" in told(caplog)[0]


@compiles
def test_a_process_that_compiled_the_same_meanwhile_is_no_error(empty_cache: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    asked = signature()
    theirs = graph_folder(asked.key) / graphs.LIBRARY

    def slowly(signature: LayerSignature, folder: Path) -> None:
        theirs.parent.mkdir(parents=True)
        theirs.write_text("theirs")
        (folder / graphs.LIBRARY).write_text("ours")

    monkeypatch.setattr(compiling, "compile_layer", slowly)
    monkeypatch.setattr(graphs, "_load", lambda folder: folder)
    find_graph(asked)
    assert theirs.read_text() == "theirs"
    assert list(empty_cache.iterdir()) == [theirs.parent]
