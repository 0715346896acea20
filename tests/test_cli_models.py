"""The verbs that fetch, list, find and delete models, with a source that keeps copies; and progress on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from torchchat_core import memory, progress
from torchchat_core.amounts import bytes_text, seconds_text
from torchchat_core.cli import listing, progress_bars, rich_bars
from torchchat_core.cli.completion import complete_model
from torchchat_core.cli.listing import fit_in_memory, table
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.models.catalogue import STARTING_MODEL, load_catalogue
from torchchat_core.products import Product, products, record
from torchchat_core.sources.inventory import ListedModel

SHELF = '''
import os, shutil
from pathlib import Path
from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import CatalogueEntry, KeptModel, ModelFiles, ModelRef, ModelSourceInfo

@hookimpl
def torchchat_model_sources():
    return [ModelSourceInfo(name="shelf", summary="s", factory="shelf:Shelf", schemes=frozenset({"shelf"}), keeps=True,
                            models=(CatalogueEntry(alias="small", reference="shelf:a", licence="MIT", bytes=61_000_000),
                                    CatalogueEntry(alias="large-M", reference="shelf:b", licence="Llama 3.2 Community",
                                                   bytes=16_060_522_496, gated=True)))]

class Shelf:
    tokens = []

    def fetch(self, ref):
        if ref.location not in "abc":
            raise TorchchatError("the shelf has no " + ref.location)
        self.tokens.append(ref.token)
        self._folder(ref).mkdir(parents=True, exist_ok=True)
        with progress.task("model.safetensors", total=61_000_000, unit="B") as task:
            task.advance(61_000_000)
        (self._folder(ref) / "model.safetensors").write_bytes(bytes(3_000))
        return self.locate(ref)

    def locate(self, ref):
        weights = self._folder(ref) / "model.safetensors"
        return ModelFiles(ref=ref, format="safetensors", root=weights.parent, weights=(weights,)
                          ) if weights.is_file() else None

    def kept(self):
        return [KeptModel(reference="shelf:" + path.parent.name, path=path.parent, bytes=3_000)
                for path in sorted(Path(os.environ["SHELF"]).glob("*/model.safetensors"))]

    def remove(self, ref):
        freed = sum(path.stat().st_size for path in self._folder(ref).glob("*"))
        shutil.rmtree(self._folder(ref), ignore_errors=True)
        return freed

    def _folder(self, ref):
        return Path(os.environ["SHELF"]) / ref.location
'''


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shelf(make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A source with two models of a name and a third one, and a cache of its own; the plugin's module."""
    monkeypatch.setenv("SHELF", str(tmp_path / "kept"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "no-config.toml"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("COLUMNS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(listing, "machine_memory", lambda: (16_000_000_000, 8_000_000_000))
    return make_plugin(SHELF, "shelf").module


def rows(torchchat: Any, *flags: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(torchchat("list", "--json", *flags).out)}


# ---- download -----------------------------------------------------------------------------------------------------


def test_download_prints_the_path_and_shows_progress(torchchat: Any, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bars, "LOG_DELAY", 0.0)
    done = torchchat("download", "small")
    assert (done.code, done.out) == (0, f"{tmp_path}/kept/a\n")
    assert re.fullmatch(r"model.safetensors \(61 MB\) ...\nmodel.safetensors done in \d.\d s\n", done.err)


def test_what_is_here_already_is_not_fetched_again(torchchat: Any, shelf: Any, tmp_path: Path) -> None:
    torchchat("download", "small")
    shelf.Shelf.fetch = None
    again = torchchat("download", "small")
    assert (again.code, again.out, again.err) == (0, f"{tmp_path}/kept/a\n", "small is already here\n")
    assert torchchat("download", "embedded").err == "embedded is already here\n"


def test_several_models_are_fetched_unless_one_is_misspelt(torchchat: Any, tmp_path: Path) -> None:
    wrong = torchchat("download", "small", "lage-M")
    assert (wrong.code, wrong.out) == (1, "")
    assert "did you mean large-M?" in wrong.err
    assert not (tmp_path / "kept").exists()
    assert torchchat("download", "small", "shelf:c").out == f"{tmp_path}/kept/a\n{tmp_path}/kept/c\n"


def test_a_failure_is_told_with_status_1(torchchat: Any) -> None:
    done = torchchat("download", "shelf:zebra")
    assert (done.code, done.err) == (1, "error: the shelf has no zebra\n")


def test_the_token_reaches_the_source_and_no_output(torchchat: Any, shelf: Any) -> None:
    done = torchchat("download", "small", "--hf-token", "hf_secret")
    assert shelf.Shelf.tokens == ["hf_secret"]
    assert "secret" not in done.out + done.err


# ---- list ---------------------------------------------------------------------------------------------------------


def test_list_shows_names_sizes_licences_and_what_is_here(torchchat: Any) -> None:
    torchchat("download", "small", "shelf:c")
    lines = torchchat("list").out.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "FITS", "LICENSE", "HERE"]
    found = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines[1:]}
    assert found["embedded"] == ["-", "yes", "BSD-3-Clause", "yes"]
    assert found["small"] == ["61 MB", "yes", "MIT", "3 kB"]
    assert found["large-M"] == ["16.1 GB", "int4", "Llama 3.2 Community, gated", "-"]
    assert found["shelf:c"] == ["-", "yes", "-", "3 kB"]


def test_list_shows_downloaded_models_first_then_the_recommended_one(torchchat: Any) -> None:
    torchchat("download", "small", "shelf:c")
    lines = [re.split(r"\s{2,}", line) for line in torchchat("list").out.splitlines()[1:]]
    assert {line[0] for line in lines[:3]} == {"embedded", "small", "shelf:c"}
    assert lines[3] == ["qwen3-0.6b", "1.5 GB", "yes", "Apache-2.0", "- (start)"]
    assert next(entry for entry in load_catalogue() if entry.alias == STARTING_MODEL).gated is False


@pytest.mark.parametrize(("total", "quantizes", "fits"), [
    (32_000_000_000, False, "yes"), (16_000_000_000, True, "int4"), (16_000_000_000, False, "no"),
    (4_000_000_000, True, "no"), (0, True, None),
])
def test_a_model_fits_in_memory_as_is_or_quantized(total: int, quantizes: bool, fits: str | None) -> None:
    assert fit_in_memory(ListedModel(name="m", reference="r", bytes=16_060_522_496), total, quantizes) == fits
    assert fit_in_memory(ListedModel(name="m", reference="r"), total, quantizes) is None


def test_on_a_terminal_the_list_ends_with_what_to_try(torchchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchchat("list").err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    err = torchchat("list").err
    assert "FITS: in the 16.0 GB of memory of this machine; int4: with --quantize linear:int4." in err
    assert "torchchat chat qwen3-0.6b" in err


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (tmp_path / "absent", limit))
    limit.write_text("max")
    whole = memory.machine_memory()[0]
    assert whole > 1_000_000_000
    limit.write_text("1000000")
    assert memory.machine_memory()[0] == 1_000_000
    assert memory.machine_memory()[1] <= 1_000_000


def test_list_tells_scripts_the_same_in_json(torchchat: Any, tmp_path: Path) -> None:
    torchchat("download", "small")
    found = rows(torchchat)
    assert found["small"] == {
        "name": "small", "reference": "shelf:a", "licence": "MIT", "gated": False, "bytes": 61_000_000,
        "path": f"{tmp_path}/kept/a", "bytes_here": 3_000, "downloaded": True, "products": [],
        "fits": "yes", "start": False}
    assert (found["large-M"]["path"], found["large-M"]["downloaded"], found["large-M"]["gated"]) == (None, False, True)


def test_list_can_show_only_what_is_here(torchchat: Any) -> None:
    torchchat("download", "large-M")
    assert list(rows(torchchat, "--downloaded")) == ["embedded", "large-M"]


def test_list_shows_what_was_made_of_a_model_while_it_exists(torchchat: Any, tmp_path: Path) -> None:
    torchchat("download", "shelf:c")
    paths = [tmp_path / f"{name}.pte" for name in ("small", "kept", "own", "gone")]
    for path, reference in zip(paths, ("shelf:a", "shelf:c", "file:/models/own", "shelf:a"), strict=True):
        path.touch()
        record(reference, "export", path, "linear:int4, cpu")
    paths[-1].unlink()
    assert f"  export  {paths[0]}  linear:int4, cpu\n" in torchchat("list").out
    made = {name: [product["path"] for product in row["products"]] for name, row in rows(torchchat).items()}
    assert {name: found for name, found in made.items() if found} == {
        "small": [str(paths[0])], "shelf:c": [str(paths[1])], "file:/models/own": [str(paths[2])]}


def test_a_source_that_fails_leaves_the_list_of_the_others(torchchat: Any, shelf: Any) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("dusty")

    shelf.Shelf.kept = broken
    done = torchchat("list")
    assert done.err == "warning: the model source 'shelf' cannot say what is here: dusty\n"
    assert "embedded" in done.out
    assert "large-M" in done.out


LONG = ListedModel(name="hf:an-owner/a-model-with-a-name-of-many-words@0123456789", reference="r", licence="MIT")
SHORT = ListedModel(name="llama3.2-1b", reference="r", licence="Llama 3.2 Community", gated=True, bytes=2_471_628_800)


def test_the_table_gives_up_the_licence_first_and_never_a_name() -> None:
    wide, narrow, narrowest = ([*table([SHORT, LONG], ["yes", None], width)] for width in (80, 50, 36))
    assert wide[1] == "llama3.2-1b  2.5 GB  yes   Llama 3.2 Community, gated  -"
    assert wide[2:] == [LONG.name, "                  -  -     MIT                         -"]
    assert narrow[1] == "llama3.2-1b  2.5 GB  yes   Llama 3.2 Commun…  -"
    assert narrowest[1] == "llama3.2-1b  2.5 GB  yes   -"
    assert max(len(line) for line in [*narrow, *narrowest] if line != LONG.name) <= 50


def test_the_catalogue_fits_into_80_columns(torchchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = torchchat("list").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_list_is_quick_and_imports_nothing_heavy(started: Any) -> None:
    """The start takes about 3.3 times the calls of click and pluggy."""
    start = started("list")
    assert not start.modules & {"torch", "numpy", "rich", "huggingface_hub", "requests", "httpx"}
    assert start.share < 4.0


# ---- where --------------------------------------------------------------------------------------------------------


def test_where_prints_the_folder_or_what_to_do(torchchat: Any, tmp_path: Path) -> None:
    missing = torchchat("where", "small")
    assert (missing.code, missing.out) == (1, "")
    assert missing.err.splitlines()[1] == "try: torchchat download small"
    torchchat("download", "small")
    assert torchchat("where", "small").out == f"{tmp_path}/kept/a\n"
    assert json.loads(torchchat("where", "small", "--json").out) == {
        "model": "small", "reference": "shelf:a", "path": f"{tmp_path}/kept/a", "format": "safetensors",
        "weights": [f"{tmp_path}/kept/a/model.safetensors"], "revision": None}


def test_where_works_for_local_paths(torchchat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert torchchat("where", "mine").out == f"{tmp_path}/mine\n"
    assert torchchat("where", "mine/model.pt").out == f"{tmp_path}/mine/model.pt\n"
    assert torchchat("where", "./nothing").code == 1
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in torchchat("where", "empty").err


def test_where_names_the_file_where_its_folder_holds_several_models(torchchat: Any, tmp_path: Path) -> None:
    torchchat("download", "small")
    (tmp_path / "kept/a/consolidated.00.pth").touch()
    assert torchchat("where", "small").out == f"{tmp_path}/kept/a/model.safetensors\n"


# ---- remove -------------------------------------------------------------------------------------------------------


def test_remove_asks_and_tells_what_became_free(torchchat: Any, tmp_path: Path) -> None:
    torchchat("download", "small")
    kept = torchchat("remove", "small", stdin=Terminal("n\n"))
    assert (kept.code, (tmp_path / "kept/a").exists()) == (130, True)
    done = torchchat("remove", "small", stdin=Terminal("y\n"))
    assert (done.code, done.out) == (0, "removed small: 3 kB are free again\n")
    assert f"Delete {tmp_path}/kept/a (3 kB)? [y/N]" in done.err
    assert not (tmp_path / "kept/a").exists()


def test_remove_deletes_nothing_where_nobody_can_be_asked(torchchat: Any, tmp_path: Path) -> None:
    torchchat("download", "small")
    done = torchchat("remove", "small")
    assert (done.code, (tmp_path / "kept/a").exists()) == (1, True)
    assert "--yes deletes without asking" in done.err
    assert torchchat("remove", "small", "--yes").code == 0
    assert not (tmp_path / "kept/a").exists()


def test_removing_what_is_not_downloaded_is_an_error(torchchat: Any) -> None:
    for flags in ([], ["--yes"]):
        done = torchchat("remove", "small", *flags)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: 'small' is not downloaded\n")


def test_what_a_broken_download_left_is_removed_with_yes(torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / "kept/a").mkdir(parents=True)
    (tmp_path / "kept/a/model.part").write_bytes(bytes(2_000))
    assert torchchat("remove", "small").code == 1
    assert torchchat("remove", "small", "--yes").out == "removed small: 2 kB are free again\n"


def shelf_of_two(shelf: Any, *models: str) -> None:
    """From now on the shelf tells that all of these models go with any of them."""
    from torchchat_core.specs import KeptModel, Removal

    def removal(self: Any, ref: Any) -> Removal:
        folder = self._folder(ref).parent
        return Removal(path=folder, bytes=6_000, models=tuple(
            KeptModel(reference=model, path=folder, bytes=3_000) for model in models))

    shelf.Shelf.removal = removal


def test_remove_asks_about_all_that_goes(torchchat: Any, shelf: Any, tmp_path: Path) -> None:
    torchchat("download", "small", "shelf:c")
    shelf_of_two(shelf, "shelf:a", "shelf:c")
    done = torchchat("remove", "small", stdin=Terminal("n\n"))
    assert done.code == 130
    assert f"Delete {tmp_path}/kept (6 kB), which holds shelf:a and shelf:c? [y/N]" in done.err
    assert "with it went shelf:a and shelf:c\n" in torchchat("remove", "small", "--yes").out


def test_remove_asks_about_what_a_broken_download_left(torchchat: Any, shelf: Any, tmp_path: Path) -> None:
    shelf_of_two(shelf)
    done = torchchat("remove", "small", stdin=Terminal("n\n"))
    assert done.code == 130
    assert f"Delete what a download that was cut off has left, {tmp_path}/kept (6 kB)? [y/N]" in done.err


def test_folders_and_files_of_the_user_are_not_removed(torchchat: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for model in ("./small", "small", tmp_path / "small", "small/model.safetensors"):
        done = torchchat("remove", model, "--yes")
        assert done.code == 1
        assert "is a folder or file of your own; only what was downloaded is removed" in done.err
    assert "no copy that was downloaded" in torchchat("remove", "embedded", "--yes").err
    assert (tmp_path / "small/model.safetensors").exists()


def test_what_was_made_of_a_model_stays_when_it_is_removed(torchchat: Any, tmp_path: Path) -> None:
    torchchat("download", "small")
    (tmp_path / "small.pte").touch()
    record("shelf:a", "export", tmp_path / "small.pte")
    assert f"what you made of it stays: {tmp_path}/small.pte" in torchchat("remove", "small", "--yes").out
    assert (tmp_path / "small.pte").exists()


# ---- the record of products ---------------------------------------------------------------------------------------


def test_a_product_is_recorded_once_by_its_absolute_path(shelf: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    record("hf:owner/old", "export", Path("a.gguf"))
    record("hf:owner/new", "quantised", tmp_path / "a.gguf", "q4_0")
    assert products() == [Product(reference="hf:owner/new", kind="quantised", path=f"{tmp_path}/a.gguf", detail="q4_0")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"products": 5}', '{"products": [5, {"kind": "export"}, {"kind": '
                                     '"export", "reference": "a", "path": "/\\u0000", "detail": ""}]}'])
def test_a_damaged_record_counts_as_none_and_is_written_anew(content: str, shelf: Any, tmp_path: Path) -> None:
    (tmp_path / "cache/torchchat").mkdir(parents=True)
    (tmp_path / "cache/torchchat/products.json").write_text(content)
    assert products() == []
    record("hf:owner/name", "converted", tmp_path)
    assert [product.path for product in products()] == [str(tmp_path)]


def test_a_record_that_cannot_be_written_stops_nobody(shelf: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    record("hf:owner/name", "export", tmp_path)
    assert products() == []


# ---- progress -----------------------------------------------------------------------------------------------------


def test_nothing_is_shown_where_nothing_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown_progress():
            pass
        assert stream.getvalue() == ""


def test_lines_tell_the_end_of_what_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bars, "LOG_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with contextlib.suppress(OSError), shown_progress(), progress.task("weights", 10_000_000, "B") as task:
        task.advance(4_000_000)
        task.advance(-1_000_000)
        raise OSError("the disk is full")
    assert re.fullmatch(r"weights \(10 MB\) \.\.\.\nweights stopped at 3 MB of 10 MB after \d+\.\d s\n",
                        stream.getvalue())


def test_short_tasks_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    monkeypatch.setattr(progress_bars, "LOG_DELAY", 1000.0)
    with contextlib.suppress(OSError), shown_progress(), progress.task("model", 2_000_000, "B") as task:
        task.advance(300)
        raise OSError
    assert stream.getvalue() == ""


def test_a_total_that_is_known_late_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bars, "LOG_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with contextlib.suppress(KeyboardInterrupt), shown_progress(), progress.task("layers") as task:
        task.set_total(32)
        task.advance(8)
        raise KeyboardInterrupt
    assert re.fullmatch(r"layers (\(32 steps\) )?\.\.\.\nlayers stopped at 8 of 32 after \d+\.\d s\n",
                        stream.getvalue())


def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal of 80 columns. pytest puts its own back after fixtures: call it in the test."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_bars_show_each_task_on_a_terminal_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    with shown_progress(), progress.task("owner/name", 4_000_000, "B") as whole, \
            progress.task("[red]model.safetensors", None, "B") as file, progress.task("layers", 32) as layers:
        file.set_total(2_000_000)
        for task, amount in ((whole, 1_000_000), (file, 1_000_000), (layers, 8)):
            task.advance(amount)
        deadline = time.monotonic() + 120
        while "8 of 32" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    shown = terminal.getvalue()
    assert "1 MB of 4 MB" in shown
    assert re.search(r"\[red\]model.safetensors.* 1 MB of 2 MB", shown)
    assert "8 of 32" in shown
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()) <= 80
    assert re.search(r"(\x1b\[2K\x1b\[1A){2}\x1b\[2K\x1b\[\?25h\r$", shown)  # all three lines are cleared


def test_what_is_over_in_a_moment_flashes_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    timers: list[Any] = []

    def never(_seconds: float, appear: Any) -> Mock:
        timers.append(appear)
        return Mock()

    monkeypatch.setattr(rich_bars, "threading", Mock(wraps=threading, Timer=never))
    with shown_progress(), progress.task("quick", 3) as task:
        task.advance(3)
    timers[0]()  # which was too late to be canceled
    assert terminal.getvalue() == ""


def test_a_task_may_be_advanced_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown_progress(), progress.task("weights", 8_000) as task:
            threads = [threading.Thread(target=lambda: [task.advance(1) for _ in range(1_000)]) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            done = task._done if hasattr(task, "_done") else task._progress.tasks[0].completed  # type: ignore[attr-defined]
        assert done == 8_000


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (60_766_848, "61 MB"),
    (2_471_628_800, "2.5 GB"), (141_107_412_992, "141 GB"), (3_500_000_000_000, "3.5 TB")])
def test_bytes_are_told_as_hubs_tell_them(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (31.4, "31 s"), (59.6, "1 min 00 s"),
                                               (185, "3 min 05 s")])
def test_durations_are_told_in_minutes_where_they_are_long(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_names_of_models_are_completed(shelf: Any) -> None:
    assert [item.value for item in complete_model(None, None, "lar")] == ["large-M", "lar"]  # type: ignore[arg-type]


def test_the_environment_is_left_alone(torchchat: Any) -> None:
    before = dict(os.environ)
    torchchat("list")
    assert dict(os.environ) == before
