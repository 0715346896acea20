"""Where a default comes from: flag, environment, file, torchchat itself, in this order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchchat_core.cli.flags import model_request
from torchchat_core.errors import TorchchatError
from torchchat_core.settings import KEYS, config_path, load_settings, variable, write_setting

NO_FLAGS: dict[str, Any] = dict.fromkeys(
    ["model", "checkpoint_path", "params_path", "tokenizer_path", "executor", "device", "dtype", "quantize",
     "max_seq_length"])


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for config.toml, and no environment."""
    for key in KEYS:
        monkeypatch.delenv(variable(key), raising=False)
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "config.toml"


@pytest.mark.parametrize(("key", "own"), [("executor", "auto"), ("device", "fast"), ("dtype", None), ("model", None)])
def test_a_flag_precedes_the_environment_which_precedes_the_file(key: str, own: str | None, config: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(model_request(NO_FLAGS), key) == own
    config.write_text(f'{key} = "of-file"\n')
    assert getattr(model_request(NO_FLAGS), key) == "of-file"
    monkeypatch.setenv(variable(key), "of-environment")
    assert getattr(model_request(NO_FLAGS), key) == "of-environment"
    assert getattr(model_request({**NO_FLAGS, key: "of-flag"}), key) == "of-flag"


def test_a_checkpoint_that_was_named_is_not_overruled_by_a_default_model(config: Path) -> None:
    config.write_text('model = "of-file"\n')
    assert model_request({**NO_FLAGS, "checkpoint_path": str(config)}).model is None  # any file that exists


def test_the_place_of_the_file_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHCHAT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config_path() == tmp_path / "xdg/torchchat/config.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_path() == tmp_path / ".config/torchchat/config.toml"


def test_setting_and_unsetting_keep_the_rest_of_the_file(config: Path) -> None:
    config.write_text('# mine\ndevice = "cpu"  # slow\n')
    write_setting("dtype", "bf16")
    write_setting("prefer.eager", "tc-eager:eager")
    assert load_settings().prefer == {"eager": "tc-eager:eager"}
    write_setting("device", None)
    with pytest.raises(TorchchatError, match="device is not set in"):
        write_setting("device", None)
    with pytest.raises(TorchchatError, match="cannot write"):
        write_setting("model", "\udcff")
    text = config.read_text()
    assert "# mine" in text
    assert load_settings().values == {"dtype": "bf16", "prefer.eager": "tc-eager:eager"}


def test_the_folder_is_made_when_the_first_setting_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "a/b/config.toml"))
    write_setting("device", "cpu")
    assert load_settings().get("device") == "cpu"


@pytest.mark.parametrize(("content", "message"), [
    ("device = ", "is not TOML"), ("devise = 'cpu'", "no setting 'devise' in .*known are model.*did you mean device"),
    ("device = 3", "'device' in .* is 3; it has to be a text"), ("prefer = 1", "has to be a table"),
    ("[prefer]\neager = 'eager'", "it has to be a full name"),
    ("[prefer]\neager = 2", "'prefer.eager' in .* is 2"), ("[device]\nx = 1", "has to be a text"),
])
def test_a_wrong_file_is_told_and_not_overwritten(content: str, message: str, config: Path) -> None:
    config.write_text(content)
    with pytest.raises(TorchchatError, match=message):
        load_settings()
    with pytest.raises(TorchchatError, match=message):
        write_setting("device", "cpu")
    assert config.read_text() == content


@pytest.mark.parametrize("key", ["devise", "prefer.", "prefer", ""])
def test_an_unknown_key_is_refused(key: str, config: Path) -> None:
    with pytest.raises(TorchchatError, match="there is no setting"):
        write_setting(key, "x")
    assert not config.exists()
