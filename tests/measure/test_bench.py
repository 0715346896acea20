"""Benchmarks: processes of their own, rows and what is made of them, and what --save is used for."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchchat_core import fastest as saved
from torchchat_core.errors import TorchchatError
from torchchat_core.fastest import remember_executor, remembered_executor
from torchchat_core.measure import benchmark, busy
from torchchat_core.measure.bandwidth import read_speed
from torchchat_core.measure.benchmark import Failed, Row, fastest, passed_over, ways
from torchchat_core.measure.benchmark_plot import draw_png, html_page
from torchchat_core.measure.benchmark_report import COLUMNS, as_csv, as_json, cells, table_lines
from torchchat_core.measure.busy import Usage
from torchchat_core.measure.rates import Rate, Rates, Spread
from torchchat_core.own_process import in_own_process, request_arguments, request_of
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry
from torchchat_core.products import reference_of
from torchchat_core.sources.reference import resolve

pytest.importorskip("tc_eager", reason="tc-eager is not installed")
Run = Callable[..., Any]
FEW = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "2")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the user, a cache folder of its own, small memory to read, and one thread in each process."""
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(saved, "cache_folder", lambda: tmp_path / "cache")


# ---- processes ----------------------------------------------------------------------------------------------------

TASKS = '''
import os, signal, sys
from torchchat_core.errors import TorchchatError

def answer(registry, **arguments):
    print("what is printed is no result")
    return {"given": arguments, "pid": os.getpid(), "plugins": [plugin.name for plugin in registry.plugins
                                                                if plugin.state == "disabled"]}

def refuse(registry):
    raise TorchchatError("it is not to be", "try another")

def fill(registry):
    raise RuntimeError("out of memory: tried to allocate\\nand more")

def crash(registry):
    os.kill(os.getpid(), getattr(signal, "SIGKILL"))

def leave(registry):
    print("the last words", file=sys.stderr)
    sys.exit(7)
'''


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "made_tasks"


def test_a_task_runs_in_another_process_with_the_same_plugins_left_out(tasks: str) -> None:
    found = in_own_process(f"{tasks}:answer", {"a": [1, "x"]}, load_registry(disabled=["tc-gguf"]))
    assert found["given"] == {"a": [1, "x"]}
    assert found["pid"] != os.getpid()
    assert found["plugins"] == [plugin.name for plugin in load_registry(disabled=["tc-gguf"]).plugins
                                if plugin.state == "disabled"]


@pytest.mark.parametrize(("task", "message"), [
    ("refuse", "it is not to be"), ("fill", "RuntimeError: out of memory: tried to allocate"),
    ("crash", "ended by SIGKILL, as the system does where memory is out"),
    ("leave", "ended with status 7: the last words"),
])
def test_how_another_process_failed_is_told(task: str, message: str, tasks: str) -> None:
    with pytest.raises(TorchchatError, match=message) as told:
        in_own_process(f"{tasks}:{task}", {}, load_registry())
    assert told.value.fix == ("try another" if task == "refuse" else None)


def test_a_request_survives_the_way_to_another_process() -> None:
    request = ModelRequest(model="m", quantize="cpu", defaults=frozenset({"device", "dtype"}))
    assert request_of(json.loads(json.dumps(request_arguments(request)))) == request


# ---- rows ---------------------------------------------------------------------------------------------------------


def _row(executor: str = "eager", decode: tuple[float, float] = (90.0, 110.0), recipe: str | None = None) -> Row:
    rate = Rate(median=sum(decode) / 2, lowest=decode[0], highest=decode[1])
    rates = Rates(prefill=rate, decode=rate, first_token=Spread(median=0.5, lowest=0.25, highest=1.0), warm_up=1.0,
                  prompt_tokens=8, new_tokens=4, repeats=2)
    return Row(executor=executor, qualified_executor=f"tc-{executor}:{executor}", device="cpu", dtype="fp32",
               recipe=recipe, schemes=(recipe,) if recipe else (), made_by=recipe, reference="file:/m", load_s=0.5,
               compile_s=2.0, rates=rates, peak_rss_bytes=300_000_000, peak_device_bytes=None,
               weight_bytes=5000, token_bytes=4000, memory_speed=1e6)


def test_the_bandwidth_is_what_tokens_read_and_the_share_that_of_the_memory() -> None:
    assert _row().bandwidth == 400_000
    assert _row().share == 0.4
    assert dict(zip(COLUMNS, cells(_row()), strict=True))["share"] == ("40 %", 0.4)
    cached = dataclasses.replace(_row(), memory_speed=_row().bandwidth / 1.5)
    assert dict(zip(COLUMNS, cells(cached), strict=True))["share"][0] == "in cache"


def test_compiling_is_what_first_times_take_beyond_later_ones() -> None:
    plain = dataclasses.asdict(_row())
    found = {name: plain[name] for name in plain if name not in ("compile_s", "recipe")}
    made = benchmark.row_of(found, "cpu", first_load=3.0)
    usual = 8 / 100 + 4 / 100
    assert made.compile_s == pytest.approx((3.0 - 0.5) + (1.0 - usual))
    assert dataclasses.replace(made, compile_s=2.0, recipe=None) == _row()


def test_the_fastest_is_the_one_that_auto_would_take_of_those_that_nothing_beats() -> None:
    pytest.importorskip("tc_compile", reason="tc-compile is not installed")
    registry = load_registry()
    eager, compiled, slow = _row(), _row("compile", (100.0, 120.0)), _row("compile", (50.0, 60.0))
    assert fastest([compiled, eager], registry) == [eager]
    assert fastest([eager, _row("compile", (200.0, 220.0))], registry)[0].executor == "compile"
    of_both = fastest([eager, slow, _row(recipe="linear:int8")], registry)
    assert [(each.executor, each.recipe) for each in of_both] == [("eager", None), ("eager", "linear:int8")]


def test_all_means_every_executor_and_every_recipe_that_is_installed() -> None:
    registry = load_registry()
    found = ways(ModelRequest(executor="all", quantize="all", device="cpu"), registry)
    assert ("eager", None) in {(way.executor, way.recipe) for way in found}
    assert ("eager", "cpu") in {(way.executor, way.recipe) for way in found}
    assert all(way.request.executor == way.executor and way.request.quantize == way.recipe for way in found)
    assert [(way.executor, way.recipe) for way in ways(ModelRequest(), registry)] == [("auto", None)]


def test_tables_csv_json_and_pictures_show_the_same_rows() -> None:
    rows, failed = [_row(), _row("compile", recipe="linear:int4")], [Failed(executor="<b>", recipe="r", reason="why")]
    lines = list(table_lines("m", rows, failed, width=200))
    assert lines[0] == "m"
    assert "not measured: <b> with r: why" in lines
    assert any("100 \u00b110 %" in line and "500 ms" in line and "40 %" in line for line in lines)
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [float(each["decode_tps_median"]) for each in read] == [100.0, 100.0]
    assert [each["schemes"] for each in read] == ["", "linear:int4"]
    assert as_json("m", rows, failed)["rows"][0]["ttft_s"]["median"] == 0.5
    page = html_page("<script>x</script>", rows, failed)
    assert "<script>x" not in page
    assert "<b>" not in page
    assert page.count("<tr") == 3


def test_a_table_that_is_wider_than_the_terminal_becomes_two() -> None:
    rows = [_row("executorch", recipe="embedding:int4"), _row("compile", recipe="linear:a8w4dq")]
    wide, narrow = (list(table_lines("m", rows, [], width)) for width in (200, 80))
    assert max(map(len, wide)) > 80 >= max(map(len, narrow))
    assert "all on cpu, fp32" in wide
    heads = [line.split() for line in narrow if line.startswith("executor ")]
    assert [head[:2] for head in heads] == [["executor", "recipe"]] * 2
    whole = next(line.split() for line in wide if line.startswith("executor "))
    assert set(heads[0]) | set(heads[1]) == set(whole)


def test_executors_that_read_other_files_are_told_of_where_the_model_can_be_exported(tmp_path: Path) -> None:
    found = passed_over(ModelRequest(executor="all", device="cpu"), load_registry())
    assert not {each.executor for each in found} & {"eager", "compile"}
    assert all(f"--executor {each.executor} exports the model once" in (each.fix or "") for each in found)
    assert passed_over(ModelRequest(device="cpu"), load_registry()) == []
    (tmp_path / "made.pte").write_bytes(b"")
    assert passed_over(ModelRequest(model=str(tmp_path / "made.pte"), executor="all"), load_registry()) == []


def test_a_picture_of_rows_is_drawn() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert draw_png("$m$", [_row(), _row("compile")]).startswith(b"\x89PNG")


def test_memory_is_read_at_a_speed() -> None:
    assert 1e6 < read_speed(1 << 20) < 1e13


# ---- the command line ---------------------------------------------------------------------------------------------


def test_every_way_is_measured_and_one_that_crashes_or_fills_the_memory_costs_its_row(torchchat: Run, testdata: Path,
                                                                  make_plugin: Callable[..., Any]) -> None:
    make_plugin('''
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ExecutorInfo

class Crashing:
    def load(self, request):
        __import__("os").abort()

class Filling:
    def load(self, request):
        __import__("torch").empty(1 << 60)

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name=name, summary="does not get far", factory=f"{__name__}:{name.title()}", order=90,
                         reads=frozenset({"module"}), devices=frozenset({"cpu"}), dtypes=frozenset({"fp32"}))
            for name in ("crashing", "filling")]
''')
    done = torchchat("-p", "no:tc-compile", "bench", testdata / "hf/stories260K", "--executor", "all", "-d", "fp32",
                     "--device", "cpu", *FEW, "--json")
    found = json.loads(done.out)
    assert done.code == 0
    row = found["rows"][0]
    assert (row["executor"], row["device"], row["dtype"], row["recipe"]) == ("eager", "cpu", "fp32", None)
    assert (row["prompt_tokens"], row["new_tokens"], row["repeats"]) == (8, 4, 2)
    assert row["token_bytes"] == row["weight_bytes"] > 1_000_000  # its embeddings are tied
    assert row["decode_tps"]["lowest"] <= row["decode_tps"]["median"] <= row["decode_tps"]["highest"]
    assert row["peak_rss_bytes"] > 100_000_000
    assert row["share"] > 0
    assert [each["executor"] for each in found["failed"][:2]] == ["crashing", "filling"]
    assert "SIGABRT" in found["failed"][0]["reason"]
    assert "you tried to allocate" in found["failed"][1]["reason"]


def test_an_executor_that_is_not_installed_is_a_usage_error(torchchat: Run) -> None:
    done = torchchat("bench", "--executor", "nope", *FEW)
    assert done.code == 2
    assert "--executor: there is no executor 'nope'" in done.err
    assert torchchat("bench", "--json", "--csv").code == 2
    assert "no folder" in torchchat("bench", "--plot", "/no/such/folder/a.png").err


def test_what_is_saved_is_what_auto_takes_for_that_model_dtype_and_recipe(testdata: Path,
                                                                         make_plugin: Callable[..., Any]) -> None:
    pytest.importorskip("tc_quant_int4", reason="tc-quant-int4 is not installed")
    make_plugin('''
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ExecutorInfo

@hookimpl
def torchchat_executors():
    return [ExecutorInfo(name="swift", summary="eager by another name", factory="tc_eager.executor:EagerExecutor",
                         reads=frozenset({"module"}), devices=frozenset({"cpu"}), dtypes=frozenset({"fp32", "bf16"}),
                         schemes=frozenset({"linear:int4"}), order=90)]
''')
    registry, path = load_registry(), str(testdata / "hf/stories260K")
    reference = reference_of(resolve(path, registry))
    remember_executor(reference, "cpu", "fp32", None, "made-plugin:swift")

    def chosen(**changes: Any) -> str:
        request = ModelRequest(**{"model": path, "device": "cpu", "dtype": "fp32", **changes})
        with open_model(request, registry) as opened:
            return opened.executor.name

    assert chosen() == "swift"
    remember_executor(reference, "cpu", "fp32", "linear:int4", "made-plugin:swift")
    assert chosen(quantize='{"linear:int4": {"groupsize": 32}}') == "swift"  # which is what it has anyway
    assert chosen(quantize='{"linear:int4": {"groupsize": 64}}') == "eager"
    assert chosen(executor="eager") == "eager"
    assert chosen(dtype="bf16") == "eager"
    remember_executor(reference, "cpu", "fp32", None, "gone:executor")
    assert chosen() == "eager"


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    path = remember_executor("file:/m", "cpu", "fp32", "linear:int4", "x:y")
    assert remembered_executor("file:/m", "cpu", "fp32", "linear:int4") == "x:y"
    assert remembered_executor("file:/m", "cpu", "fp32", "linear:int4 groupsize=64") is None
    assert remembered_executor("file:/m", "cpu", "fp32", None) is None
    for content in ("", "[]", '{"executors": 3}', '{"executors": {"k": []}}'):
        path.write_text(content)
        assert remembered_executor("file:/m", "cpu", "fp32", "linear:int4") is None


def test_save_remembers_the_fastest_of_what_was_measured(torchchat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure_way", lambda _way, *_given: _row())
    done = torchchat("bench", "--save", *FEW)
    assert "eager is the fastest on cpu in fp32" in done.err
    assert remembered_executor("file:/m", "cpu", "fp32", None) == "tc-eager:eager"


@pytest.mark.parametrize(("others", "warned"), [(1.5, True), (0.1, False)])
def test_rates_of_a_busy_machine_come_with_a_warning(others: float, warned: bool, torchchat: Run,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([Usage(all=0, idle=0, own=0), Usage(all=2, idle=2 - others, own=0)])
    monkeypatch.setattr(busy, "usage", lambda: next(seen))
    monkeypatch.setattr(benchmark, "measure_way", lambda _way, *_given: _row())
    done = torchchat("bench", *FEW)
    assert done.code == 0
    assert ("warning: other programs used" in done.err) == warned
