"""`torchchat config`: what the user has chosen once and for all."""

from __future__ import annotations

import click

from torchchat_core.errors import TorchchatError
from torchchat_core.settings import KEYS, PREFER, check_setting, config_path, load_settings, variable, write_setting


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
    check_setting(key)
    value = load_settings().get(key)
    if value is None:
        raise TorchchatError(f"{key} is not set", f"torchchat config set {key} VALUE")
    click.echo(value)


@config.command("set")
@click.argument("key")
@click.argument("value")
def set_value(key: str, value: str) -> None:
    """Set KEY to VALUE in the file."""
    click.echo(f"{key} = {value} in {write_setting(key, value)}", err=True)


@config.command("unset")
@click.argument("key")
def unset(key: str) -> None:
    """Take KEY out of the file."""
    click.echo(f"{key} taken out of {write_setting(key, None)}", err=True)
