"""What the command line says about files, and settings, that are not what they should be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MINI = ("generate", "--prompt", "x", "--max-new-tokens", 1)


@pytest.mark.parametrize("flag", ["--checkpoint-path", "--gguf-path", "--dso-path", "--aoti-package-path",
                                  "--pte-path"])
def test_a_flag_for_files_never_means_a_repository_of_a_hub(flag: str, torchchat: Any, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = torchchat(*MINI, flag, "models/none")
    assert (done.code, done.err) == (1, f"error: {flag}: there is no file or folder 'models/none'\n"
                                        "try: give the path of a file\n")


@pytest.mark.parametrize(("flag", "name", "fix"), [
    ("--pte-path", "model.gguf", "--gguf-path model.gguf"), ("--gguf-path", "model.bin", "--checkpoint-path model.bin"),
    ("--dso-path", "notes.txt", "give the .so file"),
])
def test_a_flag_for_files_of_one_kind_names_the_flag_for_another_kind(
        flag: str, name: str, fix: str, torchchat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    done = torchchat(*MINI, flag, name)
    assert done.code == 2
    assert done.err.startswith(f"error: {flag} is {name!r}; expected a file that ends in .")
    assert done.err.endswith(f"try: {fix}\n")


def test_a_wrong_file_for_the_tokenizer_is_named_itself(torchchat: Any, testdata: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    done = torchchat(*MINI, testdata / "hf/TinyStories-656K", "--tokenizer-path", tmp_path / "a.txt")
    assert (done.code, "a.txt has no name that an installed tokenizer reader knows" in done.err) == (1, True)
    assert "has no tokenizer" not in done.err


def test_wrong_params_are_not_blamed_on_the_download(torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    done = torchchat(*MINI, "embedded", "--params-path", tmp_path / "a.txt")
    assert (done.code, "a.txt is not JSON" in done.err) == (1, True)
    assert done.err.endswith("try: give the model's config.json or params.json with --params-path\n")


def test_an_unknown_url_scheme_is_not_read_as_a_path(torchchat: Any) -> None:
    done = torchchat(*MINI, "ftp://example.org/x.gguf")
    assert (done.code, done.err.partition(";")[0]) == (1, "error: no installed source fetches 'ftp' references such as "
                                                          "'ftp://example.org/x.gguf'")


@pytest.mark.parametrize("name", ["model.bin", "sha256-abc"])
def test_a_gguf_file_with_another_name_is_recognized(name: str, torchchat: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
    done = torchchat(*MINI, tmp_path / name)
    assert (done.code, f"{name!r} is a GGUF file" in done.err) == (1, True)
    assert f"try: ln -s {tmp_path / name} " in done.err


def test_without_an_exporter_the_ending_decides_what_is_installed(torchchat: Any, tmp_path: Path) -> None:
    without = [flag for name in ("executorch", "aoti", "gguf") for flag in ("-p", f"no:{name}")]
    done = torchchat(*without, "export", "embedded", "-o", tmp_path / "model.pte")
    assert (done.code, done.err) == (1, "error: no exporter is installed\ntry: leave out -p no:executorch\n")


# ---- settings -----------------------------------------------------------------------------------------------------


def test_bench_says_where_a_wrong_value_was_set(torchchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCHAT_DEVICE", "gpu")
    done = torchchat("bench", "embedded")
    assert done.code == 1
    assert "device = 'gpu' is set in TORCHCHAT_DEVICE (try: TORCHCHAT_DEVICE=cuda)" in done.out


def test_a_flag_is_not_suggested_while_a_setting_stands_in_its_way(torchchat: Any,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCHAT_DTYPE", "int8")
    done = torchchat(*MINI, "embedded")
    assert (done.code, "\ntry: unset TORCHCHAT_DTYPE, then --quantize linear:int8" in done.err) == (1, True)


def test_a_package_that_pip_keeps_is_an_error(torchchat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip ends with status 0 for a package outside its environment, and where the user says no."""
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=0))
    done = torchchat("uninstall", "--yes", "click")
    assert (done.code, done.err) == (1, "error: 'click' is still installed\ntry: pip's own words are above\n")
