"""`torchchat install` and `uninstall`: pip of the interpreter that runs torchchat."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points

import click

from torchchat_core.errors import TorchchatError, UsageError, quoted
from torchchat_core.hookspecs import ENTRY_POINT_GROUP


@click.command()
@click.argument("packages", nargs=-1, required=True, metavar="PKG...")
def install(packages: tuple[str, ...]) -> None:
    """Install plugins: pip install, for the Python that runs torchchat."""
    if not all(package.strip() for package in packages):
        raise UsageError("the name of a package is empty", "torchchat install PKG...")
    before = _plugin_names()
    _pip("install", *packages)
    added = sorted(_plugin_names() - before)
    click.echo(f"new plugins: {', '.join(added)}" if added else "no new plugins", err=True)


@click.command()
@click.argument("packages", nargs=-1, required=True, metavar="PKG...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def uninstall(packages: tuple[str, ...], yes: bool) -> None:
    """Uninstall plugins: pip uninstall, for the Python that runs torchchat."""
    if any(_distribution(package) == "torchchat-core" for package in packages):
        raise UsageError("torchchat-core is torchchat itself", "pip uninstall torchchat-core removes it")
    missing = [package for package in packages if not package.startswith("-") and not _is_installed(package)]
    if missing:
        names = ", ".join(map(quoted, missing))
        raise TorchchatError(f"{names} {'is' if len(missing) == 1 else 'are'} not installed; nothing was uninstalled",
                             "torchchat plugins, which lists the installed distributions")
    _pip("uninstall", *(["--yes"] if yes else []), *packages)
    importlib.invalidate_caches()
    kept = [package for package in packages if _is_installed(package)]  # pip's status is 0 for these, too
    if kept:
        raise TorchchatError(f"{', '.join(map(quoted, kept))} {'is' if len(kept) == 1 else 'are'} still installed",
                             "pip's own words are above")


def _distribution(package: str) -> str:
    """The distribution that a requirement such as "Name[extra]>=1" names, as indexes spell it."""
    name = re.match(r"\s*([A-Za-z0-9._-]*)", package)
    return re.sub(r"[-_.]+", "-", name[1]).lower() if name else ""


def _is_installed(package: str) -> bool:
    try:
        return bool(distribution(_distribution(package) or package))
    except (PackageNotFoundError, ValueError):
        return False


def _plugin_names() -> set[str]:
    importlib.invalidate_caches()
    return {f"{entry.dist.name if entry.dist else '?'}:{entry.name}" for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _pip(*arguments: str) -> None:
    options = [word for word in arguments[1:] if word.startswith("-") and word != "--yes"]
    if options:
        raise UsageError(f"{quoted(options[0])} is not a package", "run pip directly to pass it options")
    done = subprocess.run([sys.executable, "-P", "-m", "pip", *arguments], check=False)
    if done.returncode:
        raise TorchchatError(f"pip {arguments[0]} failed with status {done.returncode}", "pip's own words are above")
