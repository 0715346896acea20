"""Verification: agreement by hand, faults that were planted, and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchchat_core.cli.verify import other_request
from torchchat_core.errors import TorchchatError
from torchchat_core.measure import grid
from torchchat_core.measure.agreement import AgreementSum, recorded
from torchchat_core.measure.divergence import Reference, reference_file
from torchchat_core.measure.grid import EXPORT, Grid, pairs
from torchchat_core.measure.limits import EXACT, HALF, QUANTISED, RECIPES, limits_for, objections
from torchchat_core.measure.passages import Continuation, Passage, exercises
from torchchat_core.measure.text import text_windows
from torchchat_core.measure.verifying import verify
from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import load_registry

pytest.importorskip("tc_eager", reason="tc-eager is not installed")
Run = Callable[..., Any]
COMMON = ("--device", "cpu", "-d", "fp32", "--executor", "eager", "--characters", "1500")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))


# ---- agreement by hand --------------------------------------------------------------------------------------------


class Saying:
    """A model that says rows of logits one after the other, whatever it is given."""

    max_context, device, dtype = 64, "cpu", "fp32"

    def __init__(self, rows: list[list[float]]) -> None:
        self.vocab_size, self.limit, self.length = len(rows[0]), 64, 0
        self._rows = iter(rows)

    def session(self, limit: int | None = None) -> Any:
        self.length = 0
        return self

    def prefill(self, tokens: tuple[int, ...]) -> torch.Tensor:
        self.length += len(tokens)
        return torch.tensor(next(self._rows))

    def decode(self, token: int) -> torch.Tensor:
        return self.prefill((token,))

    def close(self) -> None: ...


def _agreement(first: list[list[float]], second: list[list[float]]) -> Any:
    continuation = Continuation(0, (7, 8), len(first))
    with reference_file(len(first), len(first[0])) as reference:
        list(recorded(Saying(first), [continuation], False, reference))  # type: ignore[arg-type]
        summed = AgreementSum(reference, {0: continuation})
        list(summed.observed(Saying(second), [continuation], False))  # type: ignore[arg-type]
        return continuation, summed.result


def test_figures_are_those_computed_by_hand() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    continuation, found = _agreement([[half, quarter, quarter], [0.0, 1.0, 0.5]],
                                     [[quarter, half, quarter], [0.0, 1.0, 0.5]])
    assert continuation.chosen == [0, 1]
    assert found.positions == 2
    assert found.largest_difference == pytest.approx(math.log(2))
    assert (found.largest_at.way, found.largest_at.position) == ("greedy", 1)
    assert found.mean_difference == pytest.approx(2 * math.log(2) / 6)
    assert found.mean_kl == pytest.approx(0.25 * math.log(2) / 2)  # 0.5 ln 2 - 0.25 ln 2, over two positions
    assert found.p99_kl == pytest.approx(0.25 * math.log(2))
    assert found.top_1 == 0.5
    assert found.top_5 == 1.0
    assert (found.greedy_agreed, found.greedy_tokens) == (0, 2)
    assert found.first_difference.tokens == (0, 1)
    assert found.first_difference.gaps == pytest.approx((math.log(2), math.log(2)))


def test_a_token_that_neither_model_allows_is_no_difference_and_one_that_the_second_forbids_is_infinite() -> None:
    _, found = _agreement([[0.0, -math.inf]], [[1.0, -math.inf]])
    assert (found.largest_difference, found.mean_kl) == (1.0, 0.0)
    _, found = _agreement([[0.0, 0.0]], [[0.0, -math.inf]])
    assert found.mean_kl == math.inf
    assert any("mean KL divergence is inf" in each for each in objections(found, EXACT))


def test_greedy_tokens_count_up_to_the_first_that_differs_in_each_continuation() -> None:
    rows = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    _, found = _agreement(rows, [rows[0], [1.0, 0.0], rows[2]])
    assert (found.greedy_agreed, found.greedy_tokens) == (1, 3)
    assert found.first_difference.place.position == 2  # the prompt's two tokens and one more


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 255])
def test_a_passage_gives_as_many_rows_as_it_says_and_holds_no_more_than_its_window(length: int) -> None:
    passage = Passage.of(0, text_windows(list(range(length)), 1, 256)[0])
    assert passage.read + passage.decoded == (1, *range(length - 1))
    assert passage.longest <= length
    for scores in (True, False):
        model = Scoring([[0.0, 1.0]] * 1000)
        assert sum(len(rows.logits) for rows in passage.rows(model, scores)) == passage.positions


class Scoring(Saying):
    def score(self, tokens: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([self.prefill((token,)) for token in tokens])

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length


def test_sequences_that_are_too_short_for_anything_are_refused() -> None:
    with pytest.raises(TorchchatError, match="sequences of 2 tokens are too short"):
        exercises(text_windows([1, 2, 3], 1, 3), 2, 8)


def test_limits_depend_on_dtypes_and_recipes() -> None:
    int8, int4 = "linear:int8", "linear:int4"
    assert limits_for(("fp32", "fp32"), (None, None)) is EXACT
    assert limits_for(("fp32", "bf16"), (None, None)) is HALF
    assert limits_for(("fp32", "fp32"), (int8, int8)) is QUANTISED
    assert limits_for(("fp32", "bf16"), (int8, int8)) is RECIPES
    assert limits_for(("fp32", "fp32"), (None, int8)) is RECIPES
    assert limits_for(("bf16", "bf16"), (int8, int4)) is RECIPES
    assert limits_for(("bf16", "bf16"), (int4, f"{int4} groupsize=64")) is RECIPES
    assert EXACT.changed(mean_kl=None, top_1=0.5).top_1 == 0.5
    with pytest.raises(TorchchatError, match="the limit mean_kl is -1"):
        EXACT.changed(mean_kl=-1.0)


# ---- planted faults -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["stories260K", "TinyStories-656K"])
def model(request: pytest.FixtureRequest, testdata: Path, tmp_path: Path) -> Path:
    """A copy of a real model, to be damaged."""
    shutil.copytree(testdata / "hf" / request.param, tmp_path / "copy")
    (tmp_path / "original").symlink_to(testdata / "hf" / request.param)
    return tmp_path / "copy"


def _verified(model: Path, torchchat: Run, *more: str) -> tuple[int, Any]:
    done = torchchat("verify", model.parent / "original", model, *COMMON, "--json", *more)
    assert done.out, done.err
    return done.code, json.loads(done.out)


def test_an_undamaged_copy_agrees(model: Path, torchchat: Run) -> None:
    code, found = _verified(model, torchchat)
    assert (code, found["agree"], found["largest_difference"]) == (0, True, 0.0)


@pytest.mark.parametrize(("key", "factor"), [("rope_theta", 50.0), ("rope_theta", 1.05), ("rms_norm_eps", 10.0),
                                             ("rms_norm_eps", 0.1)])
def test_a_wrong_rope_base_and_a_wrong_norm_epsilon_are_caught(key: str, factor: float, model: Path, torchchat: Run
                                                               ) -> None:
    config = json.loads((model / "config.json").read_text())
    if key == "rms_norm_eps" and config[key] * factor < 1e-6:
        pytest.skip("an epsilon below 1e-6 is below the rounding of float32 in this model")
    (model / "config.json").write_text(json.dumps({**config, key: config[key] * factor}))
    code, found = _verified(model, torchchat)
    assert (code, found["agree"]) == (1, False)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_one_weight_of_the_wrong_sign_is_caught(name: str, model: Path, torchchat: Run) -> None:
    tensors = load_file(model / "model.safetensors")
    flat = tensors[name].flatten()
    middling = int((flat.abs() - flat.abs().median()).abs().argmin())
    flat[middling] = -flat[middling]
    save_file(tensors | {name: flat.view_as(tensors[name])}, model / "model.safetensors", {"format": "pt"})
    code, found = _verified(model, torchchat)
    assert (code, found["agree"]) == (1, False)


STALE = '''
import torch

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ExecutorInfo
from tc_eager.executor import EagerExecutor, EagerModel, EagerSession


class StaleSession(EagerSession):
    """Keeps what was cut off in its cache: the next tokens attend to it."""

    def truncate(self, length):
        if FAULT == "not cut":
            return
        super().truncate(length)

    def decode(self, token):
        logits = super().decode(token)
        if FAULT == "not written":
            with torch.inference_mode():
                self.cache._keys[0][:, self.length - 1] = 0
        return logits


class StaleExecutor(EagerExecutor):
    def load(self, request):
        model = super().load(request)
        model.session = lambda limit=None: StaleSession(model, 4096 if limit is None else limit + 64)
        return model


@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name="stale", summary="eager with a fault", factory=__name__ + ":StaleExecutor",
                         reads=frozenset({"module"}), devices=frozenset({"cpu"}), dtypes=frozenset({"fp32"}),
                         abilities=frozenset({"score"}), order=90)]
'''


@pytest.mark.parametrize("fault", ["not cut", "not written"])
def test_a_stale_cache_is_caught(fault: str, testdata: Path, torchchat: Run, make_plugin: Callable[..., Any]) -> None:
    make_plugin(f"FAULT = {fault!r}\n{STALE}")
    done = torchchat("verify", testdata / "hf/stories260K", "stale", *COMMON, "--json")
    found = json.loads(done.out)
    assert (done.code, found["agree"]) == (1, False)
    assert "after a cut" in found["largest_at"]["way"] or fault == "not written"


def test_the_same_session_without_the_fault_agrees(testdata: Path, torchchat: Run, make_plugin: Callable[..., Any]
                                                   ) -> None:
    make_plugin(f"FAULT = None\n{STALE}")
    assert torchchat("verify", testdata / "hf/stories260K", "stale", *COMMON).code == 0


# ---- the command line ---------------------------------------------------------------------------------------------


def test_words_say_what_the_other_side_is() -> None:
    registry = load_registry()
    request = ModelRequest(model="one", executor="eager", dtype="fp32", device="cpu", adapter="a", quantize="cpu")
    changed = other_request(request, ["compile", "linear:int8", "bf16"], registry)
    assert (changed.model, changed.executor, changed.quantize, changed.dtype, changed.adapter) == (
        "one", "compile", "linear:int8", "bf16", "a")
    assert other_request(request, ['{"linear:int8": {}}'], registry).quantize == '{"linear:int8": {}}'
    assert other_request(request, ["executor=mine", "device=cuda"], registry).device == "cuda"
    assert other_request(request, ["model=compile"], registry).model == "compile"
    other = other_request(request, ["model.pte"], registry)
    assert (other.model, other.executor, other.quantize, other.adapter, other.dtype) == (
        "model.pte", "auto", None, None, "fp32")
    assert "dtype" in other.defaults  # an exported file has its own


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("embedded",), 2, "say what to compare it with"),
    (("embedded", "compile", "--all"), 2, "--all and OTHER ('compile') exclude each other"),
    (("embedded", "compile", "eager"), 2, "are both a executor"),
    (("embedded", "no-such-model/at-all.pte"), 1, "no file"),
    (("embedded", "--all", "--quantize", "cpu"), 2, "leave --quantize out"),
    (("embedded", "bf16", "--min-top-1", "101"), 2, "expected a number from 0 to 100"),
])
def test_wrong_words_are_told(arguments: tuple[str, ...], code: int, message: str, torchchat: Run) -> None:
    done = torchchat("verify", *arguments)
    assert done.code == code
    assert message in done.err


@pytest.mark.parametrize("other", ["no-such-model", "executor=nope", "quantize=nope"])
def test_what_the_other_side_cannot_be_is_told_before_the_first_is_run(other: str, torchchat: Run) -> None:
    done = torchchat("verify", "embedded", other, *COMMON)
    assert done.code == 1
    assert "there is no " in done.err
    assert " steps" not in done.err


def test_models_with_different_vocabularies_are_rejected_before_they_run(testdata: Path, torchchat: Run,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchchat_core.measure.verifying.open_model", lambda *_: pytest.fail("a model is run"))
    done = torchchat("verify", testdata / "hf/stories260K", testdata / "hf/TinyStories-656K", *COMMON)
    assert done.code == 1
    assert "the vocabularies differ: " in done.err


def test_the_report_names_both_sides_and_limits_that_are_given_decide(testdata: Path, torchchat: Run) -> None:
    run = ("verify", testdata / "hf/stories260K", "bf16", *COMMON)
    done = torchchat(*run)
    assert done.code == 0
    assert "first:   " in done.out
    assert ", eager, cpu, bf16" in done.out
    assert "they agree, by the limits for 16 bits" in done.out
    done = torchchat(*run, "--max-difference", "1e-9")
    assert done.code == 1
    assert "they DISAGREE, by the limits for 16 bits: difference 1e-09" in done.out
    assert "\n  the largest difference of logits is " in done.out


@pytest.mark.parametrize("change", [
    {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"}, {"add_bos_token": False}])
def test_other_tokens_of_prompts_are_a_disagreement(change: dict[str, object], testdata: Path, tmp_path: Path) -> None:
    from torchchat_core.measure.text import measured_text

    (tmp_path / "other").mkdir()
    for path in (testdata / "hf/TinyStories-656K").iterdir():
        shutil.copyfile(path, tmp_path / "other" / path.name)
    settings = json.loads((tmp_path / "other/tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "other/tokenizer_config.json").write_text(json.dumps({**settings, **change}), "utf-8")
    one, other = (ModelRequest(model=str(path), device="cpu", dtype="fp32", executor="eager")
                  for path in (testdata / "hf/TinyStories-656K", tmp_path / "other"))
    found = verify(one, other, load_registry(), measured_text(None, 300), greedy_tokens=2)
    assert found.same_tokens
    assert found.objections == ("they encode chat prompts or plain text differently",)
    assert verify(one, one, load_registry(), measured_text(None, 300), greedy_tokens=2).agrees


def test_a_second_model_that_holds_less_is_given_shorter_windows(testdata: Path, tmp_path: Path) -> None:
    shutil.copytree(testdata / "hf/stories260K", tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    from torchchat_core.measure.text import measured_text

    one, other = (ModelRequest(model=str(path), device="cpu", dtype="fp32", executor="eager")
                  for path in (testdata / "hf/stories260K", tmp_path / "short"))
    found = verify(one, other, load_registry(), measured_text(None, 600))
    assert (found.window, found.agrees) == (64, True)
    with pytest.raises(TorchchatError, match="holds 64 tokens; with these windows"):
        verify(one, other, load_registry(), measured_text(None, 600), window=128)


def test_the_grid_holds_every_executor_against_the_reference_in_processes_of_their_own(
        testdata: Path, torchchat: Run, make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make_plugin(f"FAULT = 'not cut'\n{STALE}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    crashing = STALE.replace("stale", "crashing").replace("super().load(request)", "__import__('os').abort()")
    make_plugin(f"FAULT = None\n{crashing}", distribution="crashing-plugin")
    plugins = [word for name in ("compile", "aoti", "quant-int8", "quant-int4", "executorch")
               for word in ("-p", f"no:tc-{name}")]
    done = torchchat(*plugins, "verify", testdata / "hf/stories260K", "--all", *COMMON)
    assert done.code == 1
    title, text, *lines = done.out.splitlines()
    assert "2 ways to run it, each beside eager" in title
    assert "the first 1500 of " in text
    assert lines[0] == ""
    assert lines[1].split() == ["executor", "runs", "on", "scheme", "max", "diff", "mean", "KL", "top-1", "verdict"]
    assert lines[2].split() == ["crashing", "cpu", "fp32", "-", "failed"]
    assert lines[3].startswith("  the process was ended by SIGABRT")
    assert lines[4].startswith("stale ")
    assert lines[4].endswith("DISAGREES")
    assert lines[5].startswith("  the largest difference of logits is ")
    assert lines[-1] == "0 of 2 agree, 1 disagree, 1 did not run"
    assert max(map(len, lines[1:3])) <= 80


EXPORTING = '''
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ExecutorInfo, ExporterInfo

COMMON = dict(devices=frozenset({"cpu"}), dtypes=frozenset({"fp32"}))

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name=name, summary="reads boxes", factory="tc_eager.executor:EagerExecutor",
                         reads=frozenset({"box"}), order=90, **COMMON) for name in ("one", "other")]

@hookimpl
def torchchat_exporters():
    return [ExporterInfo(name="boxer", summary="writes boxes", factory="tc_eager.executor:EagerExecutor", writes="box",
                         suffix=".box", **COMMON)]
'''


def test_a_file_that_several_executors_run_is_exported_once_and_is_gone_before_the_next(
        make_plugin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plugin(EXPORTING)
    registry = load_registry()
    request = ModelRequest(model="m", device="cpu")
    found = [pair for pair in pairs(request, registry) if pair.executor in ("one", "other")]
    assert [pair.runtime for pair in found] == ["one .box", "other .box"]
    asked: list[str] = []

    def run(task: str, arguments: Any, _registry: Any) -> Any:
        asked.append(task.partition(":")[2])
        if task == EXPORT:
            assert list(tmp_path.iterdir()) == []
            Path(arguments["path"]).write_text(arguments["request"]["dtype"])
            return {}
        assert arguments["second"]["model"] == str(tmp_path / "model.box")
        assert arguments["second"]["executor"] in ("made-plugin:one", "made-plugin:other")
        return {"agree": (tmp_path / "model.box").read_text() == arguments["first"]["dtype"]}

    monkeypatch.setattr(grid, "in_own_process", run)
    made = Grid(tmp_path, registry)
    assert all(made.verified(pair, {})["agree"] for pair in found)
    other = dataclasses.replace(found[0], second=dataclasses.replace(found[0].second, max_seq_length=7))
    assert made.verified(other, {})["agree"]
    assert asked == ["export_second", "verify_pair", "verify_pair", "export_second", "verify_pair"]

    def refuse(_task: str, _arguments: Any, _registry: Any) -> Any:
        raise TorchchatError("the disk is full", "make room")

    monkeypatch.setattr(grid, "in_own_process", refuse)
    with pytest.raises(TorchchatError, match="it cannot be exported: the disk is full"):
        made.verified(found[0], {})


def test_the_reference_keeps_rows_on_disk_in_the_order_in_which_they_came() -> None:
    with reference_file(3, 2) as reference:
        assert isinstance(reference, Reference)
        reference.keep(torch.tensor([[1.0, 2.0]]))
        reference.keep(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        reference.rewind()
        assert reference.positions(2).tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert reference.positions(1).tolist() == [[5.0, 6.0]]
