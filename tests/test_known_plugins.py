"""The data file of known plugins, and the messages that use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import torchchat_core
from torchchat_core.known_plugins import known_plugins
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.specs import CommandInfo, ExecutorInfo, ExporterInfo, ModelSourceInfo, QuantizerInfo

CORE = Path(torchchat_core.__file__).parent


def test_known_plugins_match_the_installed_plugins() -> None:
    registry = load_registry()
    by_distribution = {plugin.distribution: plugin for plugin in registry.plugins if plugin.state == "loaded"}
    compared = 0
    for entry in known_plugins():
        plugin = by_distribution.get(entry["distribution"])
        if plugin is None:
            continue
        found: dict[str, set[str]] = {}
        for info in plugin.offers:
            if isinstance(info, CommandInfo):
                found.setdefault("commands", set()).add(info.name)
            elif isinstance(info, ExecutorInfo):
                found.setdefault("executors", set()).add(info.name)
                found.setdefault("reads", set()).update(info.reads)
            elif isinstance(info, ExporterInfo):
                found.setdefault("exporters", set()).add(info.name)
                found.setdefault("writes", set()).add(info.suffix)
            elif isinstance(info, QuantizerInfo):
                found.setdefault("schemes", set()).add(info.scheme)
            elif isinstance(info, ModelSourceInfo):
                found.setdefault("formats", set()).update(info.formats)
        listed = {key: set(value) for key, value in entry.items() if key not in ("distribution", "flags")}
        assert listed == found, entry["distribution"]
        compared += 1
    if not compared:
        pytest.skip("no plugin of the project is installed")


def test_core_names_plugins_in_that_file_alone() -> None:
    names = re.compile("|".join(re.escape(entry["distribution"]) for entry in known_plugins()))
    for path in CORE.rglob("*.py"):
        found = names.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(CORE)}: {found[0] if found else ''}"


@pytest.mark.parametrize(("arguments", "distribution", "code"), [
    (["browser"], "tc-streamlit-chat", 2),
    (["generate", "--executor", "executorch"], "tc-executorch", 2),
    (["generate", "--executor", "compile"], "tc-compile", 2),
    (["generate", "--quantize", "linear:int4"], "tc-quant-int4", 2),
    (["generate", "--quantize", "pi5"], "tc-quant-int", 2),
    (["export", "embedded", "-o", "a.gguf"], "", 1),
    (["generate", "embedded", "--prompt", "x"], "tc-eager", 1),
    (["perplexity", "embedded"], "tc-eager", 1),
    (["verify", "embedded", "--all"], "tc-eager", 1),
    (["bench", "embedded", "--executor", "all"], "tc-eager", 1),
])
def test_a_plugin_that_is_not_installed_is_named(arguments: list[str], distribution: str, code: int, torchchat: Any,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD", "1")
    done = torchchat(*arguments)
    assert (done.code, f"\ntry: torchchat install {distribution}" in done.err) == (code, True), done.err


@pytest.mark.parametrize(("name", "plugins"), [("a.pte", "tc-executorch"), ("a.pt2", "tc-aoti"), ("a.so", "tc-aoti")])
def test_the_plugin_that_writes_a_file_type_is_named(name: str, plugins: str, torchchat: Any, tmp_path: Path) -> None:
    done = torchchat("-p", "no:tc-executorch", "-p", "no:tc-aoti", "export", "embedded", "-o", tmp_path / name)
    assert (done.code, f"\ntry: leave out -p no:{plugins[3:]}" in done.err) == (2, True), done.err


def test_a_file_whose_format_needs_a_plugin_names_it(torchchat: Any, monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    done = torchchat("generate", tmp_path / "m.gguf", "--prompt", "x")
    assert (done.code, "\ntry: torchchat install tc-gguf\n" in done.err) == (1, True), done.err


def test_a_plugin_that_failed_is_not_to_be_installed_again() -> None:
    registry = Registry()
    plugin = registry.add(object(), "eager", "tc-eager")
    plugin.state = "failed"
    assert registry.how_to_get("executors", "eager") == "torchchat plugins, which says why it failed"
    plugin.state = "loaded"
    assert registry.how_to_get("executors", "eager") is None
    assert registry.how_to_get("executors", "nobody-s") is None
