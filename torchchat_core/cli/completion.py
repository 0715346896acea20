"""`torchchat completion`: what a shell needs to complete verbs, flags, models and names."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from torchchat_core.plugins import load_registry
from torchchat_core.specs import DEVICES, DTYPES, ExecutorInfo, ModelSourceInfo, QuantizerInfo

SHELLS = ("bash", "zsh", "fish")
RECIPES = Path(__file__).resolve().parent.parent / "data" / "recipes"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(torchchat completion bash)"   in ~/.bashrc
    zsh:  eval "$(torchchat completion zsh)"    in ~/.zshrc
    fish: torchchat completion fish > ~/.config/fish/completions/torchchat.fish
    """
    make = get_completion_class(shell)
    if make is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    click.echo(make(context.find_root().command, {}, "torchchat", "_TORCHCHAT_COMPLETE").source())


def complete_model(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Known names, and files and folders."""
    aliases = {alias for info in load_registry().infos(ModelSourceInfo) for alias in info.aliases}
    return [*_items(aliases, typed), CompletionItem(typed, type="file")]


def complete_executor(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Installed executors."""
    return _items({"auto", *(info.name for info in load_registry().infos(ExecutorInfo))}, typed)


def complete_scheme(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Recipes, installed quantisation schemes, and files."""
    recipes = {path.stem for path in RECIPES.glob("*.json")}
    schemes = {info.scheme for info in load_registry().infos(QuantizerInfo)}
    return [*_items(recipes | schemes, typed), CompletionItem(typed, type="file")]


def complete_device(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Devices."""
    return _items({"fast", *DEVICES}, typed)


def complete_dtype(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Dtypes."""
    return _items({"fast", *DTYPES}, typed)


def _items(names: set[str], typed: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(typed)]
