"""The distributions build as wheels and work in an environment that has them and what they declare, nothing else."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path


def test_a_wheel_holds_the_package_and_nothing_else(wheels: dict[str, Path]) -> None:
    for name, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        assert {entry.split("/")[0] for entry in names} == {name, names[-1].split("/")[0]}
        assert f"{name}/py.typed" in names or name in ("tc_float8", "tc_zip")  # the examples keep to what is needed
    core = zipfile.ZipFile(wheels["torchchat_core"]).namelist()
    assert {"torchchat_core/data/embedded/model.safetensors", "torchchat_core/data/embedded/tokenizer.json",
            "torchchat_core/data/templates/llama3.jinja"} <= set(core)
    browser = zipfile.ZipFile(wheels["tc_streamlit_chat"]).namelist()
    shown = ("app.py", "style.css", "keyboard.js", "icon.svg")
    assert {f"tc_streamlit_chat/pages/{name}" for name in shown} <= set(browser)
    assert wheels["torchchat_core"].stat().st_size < 8_500_000


def test_the_two_wheels_alone_answer(environment: Path, shell: Callable[..., str]) -> None:
    answer = shell("bash", "-c", f"echo 'Who are you?' | {environment}/bin/torchchat chat --temperature 0")
    assert "torchchat" in answer
    assert "chat" in shell(environment / "bin/python", "-m", "torchchat_core", "--help")


def test_core_alone_says_which_plugin_is_missing(environment: Path) -> None:
    done = subprocess.run([environment / "bin/torchchat", "generate", "--prompt", "x"], capture_output=True, text=True,
                          check=False, env={**os.environ, "TORCHCHAT_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert (done.returncode, "try: torchchat install tc-eager" in done.stderr) == (1, True)


def test_what_is_installed_is_what_is_declared(environment: Path, shell: Callable[..., str]) -> None:
    assert "No broken requirements found" in shell(environment / "bin/python", "-m", "pip", "check")
