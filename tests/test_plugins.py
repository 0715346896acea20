"""The registry: broken, clashing and misspelt plugins cost one line each and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.hookspecs import hookimpl
from torchchat_core.plugins import Registry, load_registry
from torchchat_core.specs import CatalogueEntry, CommandInfo, ExecutorInfo, ModelSourceInfo


def executor(name: str = "fast", **fields: object) -> ExecutorInfo:
    return ExecutorInfo(name=name, summary="runs", factory="a.b:C", **fields)  # type: ignore[arg-type]


def known(**references: str) -> tuple[CatalogueEntry, ...]:
    return tuple(CatalogueEntry(alias=alias, reference=reference) for alias, reference in references.items())


def plugin(*infos: ExecutorInfo) -> ModuleType:
    module = ModuleType("a_plugin")
    module.torchchat_executors = hookimpl(lambda: list(infos))  # type: ignore[attr-defined]
    module.torchchat_executors.__name__ = "torchchat_executors"
    return module


def test_a_plugin_is_found_by_its_bare_and_its_full_name() -> None:
    registry = Registry()
    registry.add(plugin(executor()), "p", "dist-p")
    assert registry.find(ExecutorInfo, "fast") is registry.find(ExecutorInfo, "dist-p:fast")


def test_an_unknown_name_is_an_error_with_near_matches() -> None:
    registry = Registry()
    registry.add(plugin(executor("eager"), executor("aoti")), "p", "dist-p")
    with pytest.raises(TorchchatError) as caught:
        registry.find(ExecutorInfo, "eagre")
    assert caught.value.message == "there is no executor 'eagre'; installed: aoti, eager"
    assert caught.value.fix == "did you mean eager?"


def test_two_owners_of_a_name_are_an_error_that_lists_both_and_full_names_still_work() -> None:
    registry = Registry()
    registry.add(plugin(executor()), "p", "dist-p")
    registry.add(plugin(executor()), "q", "dist-q")
    registry.warn_of_clashes()
    assert registry.warnings == ["executor 'fast' is offered by dist-p:fast and by dist-q:fast; use the full name"]
    with pytest.raises(TorchchatError, match="ambiguous: dist-p:fast and dist-q:fast"):
        registry.find(ExecutorInfo, "fast")
    assert registry.find(ExecutorInfo, "dist-q:fast").name == "fast"
    assert len(registry.infos(ExecutorInfo)) == 2


def test_a_preference_or_a_replacement_settles_a_clash() -> None:
    preferring = Registry(prefer={"fast": "dist-q:fast"})
    chosen = executor()
    preferring.add(plugin(executor()), "p", "dist-p")
    preferring.add(plugin(chosen), "q", "dist-q")
    assert preferring.find(ExecutorInfo, "fast") is chosen

    replacing = Registry()
    successor = executor(replaces=frozenset({"dist-p:fast"}))
    replacing.add(plugin(executor()), "p", "dist-p")
    replacing.add(plugin(successor), "q", "dist-q")
    replacing.warn_of_clashes()
    assert replacing.warnings == []
    assert replacing.find(ExecutorInfo, "fast") is successor
    assert replacing.find(ExecutorInfo, "dist-p:fast") is not successor


def test_a_misspelt_hook_is_named_with_the_right_spelling() -> None:
    module = ModuleType("misspelt")
    module.torchchat_executor = hookimpl(lambda: [])  # type: ignore[attr-defined]
    added = Registry().add(module, "p", "dist-p")
    assert added.state == "failed"
    assert added.reason is not None
    assert "there is no hook 'torchchat_executor'" in added.reason
    assert "did you mean torchchat_executors" in added.reason


def test_a_hook_without_its_marker_is_named() -> None:
    module = ModuleType("unmarked")
    module.torchchat_executors = lambda: []  # type: ignore[attr-defined]
    added = Registry().add(module, "p", "dist-p")
    assert added.reason is not None
    assert "lacks the @hookimpl decorator" in added.reason


def test_a_hook_with_another_prefix_is_named() -> None:
    module = ModuleType("misspelt")
    module.torchcat_executors = hookimpl(lambda: [])  # type: ignore[attr-defined]
    assert "there is no hook 'torchcat_executors'" in (Registry().add(module, "p", "dist-p").reason or "")


def test_a_hook_that_exits_costs_its_plugin_alone() -> None:
    module = ModuleType("leaving")

    def leave() -> None:
        raise SystemExit(3)

    module.torchchat_executors = hookimpl(leave)  # type: ignore[attr-defined]
    registry = Registry()
    assert registry.add(module, "p", "dist-p").reason == "SystemExit: 3"
    assert registry.add(plugin(executor()), "q", "dist-q").state == "loaded"


def test_what_is_replaced_or_not_preferred_is_used_nowhere() -> None:
    replacing = Registry()
    replacing.add(plugin(executor()), "p", "dist-p")
    replacing.add(plugin(executor(replaces=frozenset({"dist-p:fast"}))), "q", "dist-q")
    assert [name for name, _ in replacing.settled(ExecutorInfo)] == ["dist-q:fast"]
    assert [name for name, _ in replacing.offers(ExecutorInfo)] == ["dist-p:fast", "dist-q:fast"]
    preferring = Registry(prefer={"fast": "dist-p:fast"})
    for name in ("p", "q"):
        preferring.add(plugin(executor()), name, f"dist-{name}")
    assert [name for name, _ in preferring.settled(ExecutorInfo)] == ["dist-p:fast"]


def source(name: str, **fields: object) -> ModuleType:
    module = ModuleType(name)
    info = ModelSourceInfo(name=name, summary="s", factory="a:B", **fields)  # type: ignore[arg-type]
    module.torchchat_model_sources = hookimpl(lambda: [info])  # type: ignore[attr-defined]
    return module


def test_what_core_claims_stays_its_own_and_other_clashes_are_errors(isolated_registry: Registry) -> None:
    for name in ("one", "two"):
        claiming = source(name, schemes=frozenset({"file", "s3"}), models=known(embedded="file:x"))
        isolated_registry.add(claiming, name, name)
    isolated_registry.warn_of_clashes()
    warnings = isolated_registry.warnings
    assert "schemes: 'file' is claimed by one:one and by torchchat-core:local and by two:two" in warnings
    own = isolated_registry.claim("schemes", "file")
    assert own is not None
    assert own.name == "local"
    assert isolated_registry.claim("schemes", "absent") is None
    with pytest.raises(TorchchatError, match="'s3' is claimed by the model sources one:one and two:two"):
        isolated_registry.claim("schemes", "s3")


def test_an_alias_of_an_alias_is_refused(isolated_registry: Registry) -> None:
    from torchchat_core.sources.reference import resolve

    isolated_registry.add(source("looping", models=known(a="b", b="a")), "looping", "looping")
    with pytest.raises(TorchchatError, match="the name 'a' stands for another name, 'b'"):
        resolve("a", isolated_registry)


@pytest.mark.parametrize("fields", [
    {"order": "x"}, {"reads": None}, {"schemes": frozenset({1})}, {"abilities": "score"}, {"options": 3},
])
def test_a_field_of_the_wrong_type_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(TorchchatError, match=r"it has to be of the type|are not a dataclass"):
        executor(**fields)


@pytest.mark.parametrize("returned", [None, [1], "eager", [CommandInfo(name="x", summary="x", factory="a:b")]])
def test_a_hook_that_returns_the_wrong_thing_leaves_the_plugin_out(returned: object) -> None:
    module = ModuleType("wrong")
    module.torchchat_executors = hookimpl(lambda: returned)  # type: ignore[attr-defined]
    registry = Registry()
    added = registry.add(module, "p", "dist-p")
    assert added.state == "failed"
    assert "torchchat_executors has to return a list of ExecutorInfo" in (added.reason or "")
    assert registry.infos(ExecutorInfo) == []


def test_one_plugin_cannot_offer_a_name_twice() -> None:
    added = Registry().add(plugin(executor(), executor()), "p", "dist-p")
    assert added.state == "failed"
    assert "two executors called 'fast'" in (added.reason or "")


def test_a_failed_plugin_offers_nothing_and_the_others_stay() -> None:
    registry = Registry()
    registry.add(plugin(executor("good")), "p", "dist-p")
    registry.add(plugin(executor("half"), executor("half")), "q", "dist-q")
    assert [info.name for info in registry.infos(ExecutorInfo)] == ["good"]


@pytest.mark.parametrize(("fields", "message"), [
    ({"name": "Upper"}, "name 'Upper'"),
    ({"name": "x", "factory": "nocolon"}, "has to be 'package.module:attribute'"),
    ({"name": "x", "summary": "two\nlines"}, "one line"),
    ({"name": "x", "abilities": frozenset({"magic"})}, "unknown ability 'magic'"),
])
def test_a_malformed_description_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(TorchchatError, match=message):
        ExecutorInfo(**{"summary": "s", "factory": "a.b:C", **fields})  # type: ignore[arg-type]


def test_a_factory_that_cannot_be_imported_is_a_readable_error() -> None:
    with pytest.raises(TorchchatError, match="executor 'fast' cannot be used: No module named 'a'"):
        executor().make()


def test_an_ability_that_is_not_declared_is_refused() -> None:
    executor(abilities=frozenset({"score"})).require("score")
    with pytest.raises(TorchchatError, match="executor 'fast' has no ability 'batch'"):
        executor().require("batch")


def test_the_builtins_come_through_the_same_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD", "1")
    registry = load_registry()
    assert [each.qualified_name for each in registry.plugins] == ["torchchat-core:builtins"]
    assert {info.name for info in registry.infos(ModelSourceInfo)} == {"local", "embedded", "hub", "url"}
    assert registry.infos(ExecutorInfo) == []


def install(folder: Path, name: str, code: str) -> None:
    """A distribution with one plugin module, as pip would leave it in a folder of the path."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[torchchat.v1]\n{module} = {module}\n", encoding="utf-8")


def test_entry_points_are_loaded_and_a_raising_one_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "bad-import", "raise RuntimeError('no\\nluck')")
    install(tmp_path, "bad-exit", "raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = load_registry()
    rows = {each.name: each for each in registry.plugins}
    assert rows["bad_import"].state == "failed"
    assert rows["bad_import"].reason == "RuntimeError: no luck"
    assert rows["bad_exit"].reason == "SystemExit: 3"
    assert "eager" in {info.name for info in registry.infos(ExecutorInfo)}
    assert "plugin bad-import:bad_import is left out: RuntimeError: no luck" in registry.warnings

    states = {each.name: each.state for each in load_registry(disabled=["bad-import", "bad_exit"]).plugins}
    assert states.items() >= {"builtins": "loaded", "eager": "loaded", "bad_import": "disabled",
                              "bad_exit": "disabled"}.items()
    assert "there is no plugin 'absent' to disable" in load_registry(disabled=["absent"]).warnings
    monkeypatch.setenv("TORCHCHAT_STRICT_PLUGINS", "1")
    with pytest.raises((RuntimeError, SystemExit)):
        load_registry()
