"""`torchchat config`: what the user has chosen once and for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from torchchat_core.cli.setting_values import check_setting_value
from torchchat_core.errors import TorchchatError, UsageError
from torchchat_core.plugins import Registry
from torchchat_core.settings import KEYS, PREFER, check_setting, config_path, load_settings, variable, write_setting
from torchchat_core.small_files import expanded


@contextmanager
def _usage_errors(key: str | None = None) -> Iterator[None]:
    """Turn each `TorchchatError` in the block into a `UsageError` whose message starts with `key`."""
    try:
        yield
    except TorchchatError as error:
        named = f"{key}: " if key is not None and repr(key) not in error.message else ""
        raise UsageError(f"{named}{error.message}", error.fix) from None


@click.group()
def config() -> None:
    """Show and change the defaults: model, executor, device, dtype, prefer.NAME.

    A flag comes before an environment variable, a variable before the file, the file before what torchchat does by
    itself.
    """


@config.command("list")
def list_settings() -> None:
    """Every setting, its value, and where the value comes from."""
    settings = load_settings()
    click.echo(f"# {config_path()}")
    for key in [*KEYS, *(key for key in settings.values if key.startswith(PREFER))]:
        value = settings.get(key)
        if value is None:
            click.echo(f"{key:<10} (not set: {KEYS[key]}; {variable(key)} sets it too)")
        else:
            click.echo(f"{key:<10} {value}  (from {settings.origins[key]})")


@config.command("get")
@click.argument("key")
def get(key: str) -> None:
    """Print the value of KEY."""
    with _usage_errors():
        check_setting(key)
    value = load_settings().get(key)
    if value is None:
        raise TorchchatError(f"{key} is not set", f"torchchat config set {key} VALUE")
    click.echo(value)


@config.command("set")
@click.argument("key")
@click.argument("value")
@click.pass_obj
def set_value(registry: Registry, /, key: str, value: str) -> None:
    """Check VALUE and set KEY to it in the file."""
    with _usage_errors(key):
        check_setting(key, value)
        check_setting_value(key, value, registry)
    if key == "model" and (path := expanded(value)).exists():
        value = str(path.absolute())  # the setting applies in every folder
    click.echo(f"{key} = {value} in {write_setting(key, value)}", err=True)


@config.command("unset")
@click.argument("key")
def unset(key: str) -> None:
    """Remove KEY from the file."""
    with _usage_errors():
        check_setting(key)
    click.echo(f"{key} removed from {write_setting(key, None)}", err=True)
