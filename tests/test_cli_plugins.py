"""The verbs that tell what is installed, and the ones that change it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchchat_core import kernels
from torchchat_core.kernels.build import library_path


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs the command line as a process, with a configuration of its own."""

    def start(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TORCHCHAT_CONFIG": str(tmp_path / "config.toml"), **changes}
        return subprocess.run([sys.executable, "-m", "torchchat_core", *arguments], capture_output=True, text=True,
                              env=environment, check=False, timeout=120)

    return start


def fake_plugin(folder: Path, name: str, code: str, requires: str = "") -> str:
    """A distribution on a path of its own; the path."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
    (info / "entry_points.txt").write_text(f"[torchchat.v1]\n{name} = {name}\n")
    return str(folder)


def test_plugins_lists_what_each_offers_and_why_one_failed(run: Any, tmp_path: Path) -> None:
    path = fake_plugin(tmp_path, "broken", "import nothing_of_that_name")
    done = run("plugins", PYTHONPATH=path)
    assert done.returncode == 0
    assert "tc-eager:eager 0.1" in done.stdout
    assert "broken:broken 1.0  [failed]\n    ModuleNotFoundError: No module named 'nothing_of_that_name'" in done.stdout
    rows = {row["name"]: row for row in json.loads(run("plugins", "--json", PYTHONPATH=path).stdout)}
    assert rows["broken"]["state"] == "failed"
    assert {"kind": "executor", "name": "eager"}.items() <= rows["eager"]["offers"][0].items()


def test_the_matrix_is_a_table_or_json(run: Any) -> None:
    lines = run("plugins", "--matrix").stdout.splitlines()
    assert lines[0].split() == ["executor", "model", "quantization", "cpu", "cuda", "mps"]
    eager = next(line for line in lines if line.startswith("tc-eager:eager"))
    assert re.match(r"tc-eager:eager +in memory +none +fp32, bf16, fp16 ", eager)
    assert not any("|" in line for line in lines)
    rows = json.loads(run("plugins", "--matrix", "--json").stdout)
    assert all(row["refusal"] is None for row in rows if row["executor"] == "tc-eager:eager" and row["scheme"] is None
               and row["format"] == "module")


def test_doctor_is_content_with_a_sound_installation(run: Any) -> None:
    done = run("doctor", "--offline")
    assert done.returncode == 0, done.stdout
    for word in ("python", "torch", "processor", "memory", "cache", "network", "tc-eager:eager", "settings"):
        assert word in done.stdout
    checks = json.loads(run("doctor", "--offline", "--json").stdout)
    assert all(check["ok"] is not False for check in checks)


@pytest.mark.parametrize(("changes", "detail", "fix"), [
    ({"CXX": "true"}, "not compiled yet; true does it", "torchchat doctor --build-kernels"),
    ({"CXX": "nonesuch"}, "CXX is 'nonesuch', which is not a program; PyTorch's serve", "set CXX to"),
    ({"TORCHCHAT_CPU_KERNELS": "off"}, "TORCHCHAT_CPU_KERNELS is off; PyTorch's serve", ""),
])
def test_doctor_says_whether_the_kernels_are_there(changes: dict[str, str], detail: str, fix: str, run: Any,
                                                   tmp_path: Path) -> None:
    done = run("doctor", "--offline", "--json", **{**changes, "XDG_CACHE_HOME": str(tmp_path)})
    check = next(check for check in json.loads(done.stdout) if check["name"] == "cpu kernels")
    assert (check["ok"], detail in check["detail"], fix in (check["fix"] or "")) == (None, True, True), check


def test_doctor_builds_the_kernels_or_says_why_it_cannot(run: Any, tmp_path: Path) -> None:
    done = run("doctor", "--build-kernels", CXX="nonesuch", XDG_CACHE_HOME=str(tmp_path / "empty"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: CXX is 'nonesuch'" in done.stderr
    if kernels.load() is None:
        done = run("doctor", "--build-kernels")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{library_path()}\n", "")


def test_no_message_recommends_a_module_that_the_current_folder_can_replace() -> None:
    root = Path(__file__).parents[1]
    sources = [source for folder in ("torchchat_core", "plugins/*/tc_*", "apps/*/tc_*")
               for source in root.glob(f"{folder}/**/*.py")]
    unsafe = re.compile(r"(python|executable\}?) -m |executable, \"-[mc]\"")
    found = [source.relative_to(root) for source in sources if unsafe.search(source.read_text(encoding="utf-8"))]
    assert found == [Path("torchchat_core/__main__.py")]  # which documents it


@pytest.mark.parametrize(("code", "requires", "detail", "fix"), [
    ("raise ImportError('no wheel')", "", "ImportError: no wheel", "pip install --force-reinstall sick"),
    ("", "nothing-of-that-name>=2", "needs nothing-of-that-name>=2; it is not installed", "pip install 'nothing-of"),
    ("", "click<1", "needs click<1; 8", "pip install 'click<1'"),
    ("", "nothing-of-that-name; extra == 'x'", "", ""),
    ("", "foo bar baz", "needs foo bar baz; which cannot be read", ""),
])
def test_doctor_tells_what_a_plugin_lacks_and_the_command_that_mends_it(code: str, requires: str, detail: str, fix: str,
                                                                        run: Any, tmp_path: Path) -> None:
    done = run("doctor", "--offline", PYTHONPATH=fake_plugin(tmp_path, "sick", code, requires))
    assert done.returncode == (1 if detail else 0)
    assert detail in done.stdout
    assert fix in done.stdout


@pytest.mark.parametrize(("key", "value", "detail"), [
    ("model", "no-such-model", "there is no model 'no-such-model'"), ("device", "gpu", "unknown device 'gpu'"),
    ("dtype", "fp8", "unknown dtype 'fp8'"), ("executor", "eagre", "there is no executor 'eagre'"),
    ("prefer.eager", "a:b", "no installed plugin offers 'a:b'"),
])
def test_doctor_reports_a_setting_that_cannot_work(key: str, value: str, detail: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("".join(f"{part!r}." for part in key.split(".")[:-1])
                                          + f"{key.split('.')[-1]} = {value!r}\n")
    done = run("doctor", "--offline", TORCHCHAT_CONFIG=str(tmp_path / "config.toml"))
    assert (done.returncode, detail in done.stdout) == (1, True), done.stdout


@pytest.mark.parametrize(("key", "value", "message"), [
    ("model", "no-such-model", "model: there is no model 'no-such-model'"),
    ("device", "gpu", "device: unknown device 'gpu'"), ("device", "", "'device' is ''; it has to be a text"),
    ("dtype", "fp8", "dtype: unknown dtype 'fp8'"), ("executor", "eagre", "executor: there is no executor 'eagre'"),
    ("prefer.eager", "a:b", "no installed plugin offers 'a:b' under the name 'eager'"),
    ("prefer.xyz", "a:b", "no installed plugin offers anything named 'xyz'"), ("devise", "cpu", "no setting 'devise'"),
])
def test_a_setting_that_cannot_be_right_is_not_written(key: str, value: str, message: str, torchchat: Any,
                                                       monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    done = torchchat("config", "set", key, value)
    assert (done.code, message in done.err) == (2, True), done.err
    assert not (tmp_path / "config.toml").exists()


def test_a_setting_that_can_be_right_is_written(torchchat: Any, monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for key, value in (("device", "cuda"), ("executor", "auto"), ("dtype", "fast16"),
                       ("prefer.eager", "tc-eager:eager"), ("model", "m")):
        assert torchchat("config", "set", key, value).code == 0
    assert torchchat("config", "get", "model").out == f"{tmp_path / 'm'}\n"


@pytest.mark.parametrize(("key", "value", "error", "fix"), [
    ("device", "gpu", "unknown device 'gpu'", "device cuda"), ("model", "no-such-model", "there is no model", None),
    ("executor", "eagre", "there is no executor 'eagre'", "did you mean eager?"),
    ("dtype", "fp8", "unknown dtype 'fp8'", None)])
def test_an_error_about_a_setting_says_where_it_was_set(key: str, value: str, error: str, fix: str | None,
                                                        torchchat: Any, monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(config))
    config.write_text(f"{key} = {value!r}\n")
    done = torchchat("generate", "--prompt", "x")
    assert (done.code, error in done.err) == (1, True), done.err
    assert f"; {key} = {value!r} is set in {config}\n" in done.err
    assert fix is None or fix in done.err
    config.unlink()
    monkeypatch.setenv(f"TORCHCHAT_{key.upper()}", value)
    done = torchchat("generate", "--prompt", "x")
    assert f"; {key} = {value!r} is set in TORCHCHAT_{key.upper()}\n" in done.err
    if key != "model":  # an error about something else
        assert "is set in" not in torchchat("generate", "no-such-name", "--prompt", "x").err


def test_doctor_tells_a_choice_that_does_not_go_together_and_an_address_that_is_none(run: Any, tmp_path: Path) -> None:
    path = fake_plugin(tmp_path, "late", "from torchchat_core.hookspecs import hookimpl\n"
                       "from torchchat_core.specs import ExecutorInfo\n@hookimpl\ndef torchchat_executors():\n"
                       "    return [ExecutorInfo(name='late', summary='x', factory='a:b',\n"
                       "        reads=frozenset({'module'}), devices=frozenset({'cpu'}), dtypes=frozenset({'fp32'}))]")
    chosen = {"PYTHONPATH": path, "TORCHCHAT_EXECUTOR": "late"}
    assert "'late' does not compute in bf16" in run("doctor", "--offline", TORCHCHAT_DTYPE="bf16", **chosen).stdout
    assert "cannot be used: No module named 'a'" in run("doctor", "--offline", **chosen).stdout
    wrong = run("doctor", "--offline", TORCHCHAT_DEVICE="banana")
    assert "unset TORCHCHAT_DEVICE, or set it to another value" in wrong.stdout
    assert "HF_ENDPOINT is 'http://x:abc'" in run("doctor", HF_ENDPOINT="http://x:abc").stdout


def test_config_sets_gets_lists_and_unsets(run: Any) -> None:
    assert run("config", "get", "device").returncode == 1
    run("config", "set", "device", "cpu")
    assert run("config", "get", "device").stdout == "cpu\n"
    assert "device     cpu  (from " in run("config", "list").stdout
    assert "device     mps  (from TORCHCHAT_DEVICE)" in run("config", "list", TORCHCHAT_DEVICE="mps").stdout
    run("config", "unset", "device")
    assert run("config", "get", "device").stderr.startswith("error: device is not set\ntry: torchchat config set")
    assert "did you mean device" in run("config", "set", "devise", "cpu").stderr


@pytest.mark.parametrize("content", ["device = ", "devise = 'cpu'", None])
def test_a_damaged_file_leaves_help_and_doctor_working(content: str | None, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    place = {"TORCHCHAT_CONFIG": str(path)}
    assert run("--help", **place).returncode == 0
    done = run("doctor", "--offline", **place)
    assert (done.returncode, "WRONG settings" in done.stdout) == (1, True)
    refused = run("generate", "--prompt", "x", **place)
    assert (refused.returncode, refused.stdout, "\nerror: " in refused.stderr) == (1, "", True)


def test_a_preference_settles_a_clash_and_its_warning(run: Any, tmp_path: Path) -> None:
    path = fake_plugin(tmp_path, "rival", "from torchchat_core.hookspecs import hookimpl\n"
                       "from torchchat_core.specs import ExecutorInfo\n@hookimpl\ndef torchchat_executors():\n"
                       "    return [ExecutorInfo(name='eager', summary='x', factory='a:b')]")
    assert "warning: executor 'eager'" in run("plugins", PYTHONPATH=path).stderr
    run("config", "set", "prefer.eager", "tc-eager:eager")
    assert run("plugins", PYTHONPATH=path).stderr == ""


def test_tracing_prints_hook_calls_and_their_results(run: Any) -> None:
    done = run("plugins", TORCHCHAT_TRACE_PLUGINS="1")
    assert "trace: tc-eager:eager torchchat_executors() -> [[ExecutorInfo(name='eager'" in done.stderr
    assert "trace: " not in run("plugins").stderr


@pytest.mark.parametrize(("words", "expected"), [
    ("torchchat ge", "generate"), ("torchchat generate emb", "embedded"), ("torchchat generate --executor ea", "eager"),
    ("torchchat generate --dtype b", "bf16"), ("torchchat generate --tem", "--temperature"),
    ("torchchat config s", "set"),
])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_models_flags_and_names(words: str, expected: str, shell: str, run: Any) -> None:
    typed = words.split()
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(len(typed) - 1) if shell != "fish" else typed[-1]}
    done = run(_TORCHCHAT_COMPLETE=f"{shell}_complete", **variables)
    assert expected in done.stdout, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_names_the_command_and_its_variable(shell: str, run: Any) -> None:
    script = run("completion", shell).stdout
    assert "torchchat" in script
    assert f"_TORCHCHAT_COMPLETE={shell}_complete" in script


def test_install_and_uninstall_say_what_pip_could_not_do(run: Any) -> None:
    done = run("install", "/nonexistent/no-such-package-1.0-py3-none-any.whl")
    assert (done.returncode, "error: pip install failed with status" in done.stderr) == (1, True)
    assert "'--index-url' is not a package" in run("install", "--", "--index-url").stderr
    for name in ("torchchat_core", "torchchat.core", "TorchChat--Core>=0", " torchchat-core[testing]"):
        assert "torchchat-core is torchchat itself" in run("uninstall", "--yes", name).stderr
    assert run("install").returncode == 2
    done = run("uninstall", "--yes", "no-such-package")
    assert (done.returncode, "'no-such-package' is not installed" in done.stderr) == (1, True)


def test_thirty_plugins_add_little_to_help(started: Any, tmp_path: Path) -> None:
    """Each takes at most a thirtieth of the calls of click and pluggy."""
    code = "from torchchat_core.hookspecs import hookimpl\nfrom torchchat_core.specs import ExecutorInfo\n" \
           "@hookimpl\ndef torchchat_executors():\n    return [ExecutorInfo(name='x{}', summary='x', factory='a:b')]\n"
    for index in range(30):
        path = fake_plugin(tmp_path, f"dummy{index}", code.format(index))
    assert started("--help", PYTHONPATH=path).share - started("--help").share < 1.0
