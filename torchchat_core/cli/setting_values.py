"""Check the values of settings, and add to an error the places where the values that it mentions were set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.plugins import Registry
from torchchat_core.run_options import check_device, check_dtype
from torchchat_core.settings import KEYS, PREFER, Settings, variable
from torchchat_core.specs import ExecutorInfo

USED = "torchchat.settings"  # key of a click context's `meta`: the settings that no flag replaced


def check_setting_value(key: str, value: str, registry: Registry) -> None:
    """Raise `TorchchatError` if the value is invalid for the setting with the installed plugins."""
    if key == "model":
        from torchchat_core.sources.reference import resolve

        resolve(value, registry)
    elif key == "device":
        check_device(value, "torchchat config set device {}")
    elif key == "dtype":
        check_dtype(value, suggested="torchchat config set dtype {}")
    elif key == "executor" and value != "auto":
        registry.find(ExecutorInfo, value)
    elif key.startswith(PREFER):
        _check_preference(key.removeprefix(PREFER), value, registry)


def _check_preference(name: str, value: str, registry: Registry) -> None:
    offered = sorted(f"{plugin.distribution}:{info.name}" for plugin in registry.plugins for info in plugin.offers)
    if value in offered and value.rpartition(":")[2] == name:
        return
    choices = [each for each in offered if each.rpartition(":")[2] == name]
    if not choices:
        raise TorchchatError(f"no installed plugin offers anything named {quoted(name)}", "torchchat plugins")
    raise TorchchatError(f"no installed plugin offers {quoted(value)} under the name {quoted(name)}; expected one of "
                         f"{', '.join(choices)}", f"torchchat config set {PREFER}{name} {choices[0]}")


def note_used(settings: Settings, given: Mapping[str, Any]) -> None:
    """Record the settings that the command uses, those that no `given` flag overrides, for `with_origin`."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[USED] = {key: (value, settings.origins[key]) for key in KEYS
                              if key not in given and (value := settings.get(key)) is not None}


def with_origin(error: TorchchatError, context: click.Context) -> TorchchatError:
    """Return the error with the origin of each setting whose value it mentions; the same error if there is none."""
    used: Mapping[str, tuple[str, str]] = context.meta.get(USED, {})
    mentioned = {key: found for key, found in used.items()
                 if re.search(rf"(?<![\w.-]){re.escape(found[0])}(?![\w.-])", error.message)}
    if not mentioned:
        return error
    notes = [f"{key} = {quoted(value)} is set in {origin}" for key, (value, origin) in mentioned.items()]
    key, (_, origin) = next(iter(mentioned.items()))
    fix = error.fix or (f"unset {origin}" if origin == variable(key) else f"torchchat config unset {key}")
    flag = re.match(rf"(?:use )?--{key} (\S+)", fix)
    if flag:
        fix = f"{origin}={flag[1]}" if origin == variable(key) else f"torchchat config set {key} {flag[1]}"
    elif fix.startswith("--"):  # a flag of another kind does not help while the setting holds
        fix = f"{f'unset {origin}' if origin == variable(key) else f'torchchat config unset {key}'}, then {fix}"
    return type(error)(f"{error.message}; {'; '.join(notes)}", fix)
