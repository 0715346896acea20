"""What a user has chosen once and for all: config.toml and environment variables.

A flag comes before the environment, the environment before the file, and the file before what torchchat does by
itself. Standard library alone: every start of the command line reads this.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, did_you_mean, quoted, quoted_path
from torchchat_core.small_files import expanded, write_whole, xdg_folder

CONFIG_FILE = "TORCHCHAT_CONFIG"
KEYS = {
    "model": "what `torchchat chat` talks with where no MODEL is given",
    "executor": "what runs a model: a name, or auto",
    "device": "cpu, cuda, mps or fast",
    "dtype": "fp32, bf16, fp16 or fast",
}
PREFER = "prefer."  # prefer.NAME = "distribution:name" settles which of two plugins a bare name means


@dataclass(frozen=True)
class Settings:
    """The values of `KEYS` and of `prefer`, each with the place that it comes from."""

    values: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str) -> str | None:
        """The value of a key, or None where neither the environment nor the file has one."""
        return self.values.get(key)

    @property
    def prefer(self) -> dict[str, str]:
        """Bare name -> the qualified name that it means."""
        return {key.removeprefix(PREFER): value for key, value in self.values.items() if key.startswith(PREFER)}


def config_path() -> Path:
    """Where config.toml is, or would be."""
    named = os.environ.get(CONFIG_FILE)
    if named:
        return expanded(named)
    return (xdg_folder("XDG_CONFIG_HOME") or Path.home() / ".config") / "torchchat" / "config.toml"


def variable(key: str) -> str:
    """The environment variable of a key."""
    return f"TORCHCHAT_{key.upper()}"


def load_settings() -> Settings:
    """The settings in force. Raises `TorchchatError` for a file that is no TOML or has keys that nobody knows."""
    path = config_path()
    values = read_config(path)
    origins = dict.fromkeys(values, str(path))
    for key in KEYS:
        given = os.environ.get(variable(key))
        if given:
            values[key], origins[key] = given, variable(key)
    return Settings(values, origins)


def read_config(path: Path) -> dict[str, str]:
    """The values in a config.toml by key, `prefer.NAME` for those of the table; nothing where there is no file."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TorchchatError(f"cannot read the settings in {quoted_path(str(path))}: {error.strerror or error}",
                             f"unset {CONFIG_FILE}, or set it to a file" if os.environ.get(CONFIG_FILE) else None
                             ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TorchchatError(f"{quoted_path(str(path))} is not TOML: {error}", "fix the file, or delete it") from None
    flat: dict[str, Any] = {key: value for key, value in found.items() if key != "prefer"}
    prefer = found.get("prefer", {})
    if not isinstance(prefer, dict):
        raise TorchchatError(f"prefer in {quoted_path(str(path))} has to be a table of names")
    flat |= {f"{PREFER}{name}": value for name, value in prefer.items()}
    for key, value in flat.items():
        check_setting(key, value, f" in {quoted_path(str(path))}")
    return flat


def check_setting(key: str, value: object = "any:text", where: str = "") -> None:
    """Raises `TorchchatError` for a key that nobody knows, or a value that is no text."""
    if key not in KEYS and not (key.startswith(PREFER) and key != PREFER):
        raise TorchchatError(f"there is no setting {quoted(key)}{where}; known are {', '.join(KEYS)} and prefer.NAME",
                             did_you_mean(key, KEYS))
    if not isinstance(value, str) or not value:
        raise TorchchatError(f"the setting {quoted(key)}{where} is {quoted(value)}; it has to be a text")
    if key.startswith(PREFER) and ":" not in value:
        raise TorchchatError(f"the setting {quoted(key)}{where} is {quoted(value)}; it has to be a full name, "
                             "distribution:name")


def write_setting(key: str, value: str | None) -> Path:
    """Sets a key in config.toml, or removes it for None; comments and the rest stay as they are."""
    import tomlkit

    check_setting(key, "any:text" if value is None else value)
    path = config_path()
    read_config(path)  # a damaged file is told, not overwritten
    document = tomlkit.parse(path.read_text(encoding="utf-8-sig")) if path.exists() else tomlkit.document()
    table: Any = document
    if key.startswith(PREFER):
        table = document.setdefault("prefer", tomlkit.table())
        key = key.removeprefix(PREFER)
    if value is None:
        if key not in table:
            raise TorchchatError(f"{key} is not set in {quoted_path(str(path))}")
        del table[key]
    else:
        table[key] = value
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TorchchatError(f"cannot make {quoted_path(str(path.parent))}: {error.strerror or error}") from None
    write_whole(path.resolve(), tomlkit.dumps(document))
    return path
