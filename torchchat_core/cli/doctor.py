"""`torchchat doctor`: what this machine has, what is installed, and what would mend what is not right."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from torchchat_core import __version__
from torchchat_core.cli.setting_values import check_setting_value
from torchchat_core.errors import TorchchatError
from torchchat_core.memory import machine_memory
from torchchat_core.network import connection_fault, hub_endpoint
from torchchat_core.plugins import CORE, Plugin, Registry
from torchchat_core.settings import KEYS, Settings, config_path, load_settings, variable
from torchchat_core.small_files import cache_folder

MINIMUM_PYTHON = (3, 11)
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "neon", "asimd", "sve", "i8mm")


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None: a fact, neither right nor wrong."""

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--offline", is_flag=True, help="Do not try the network.")
@click.option("--build-kernels", is_flag=True, help="Only compile the CPU kernels, so that the first model need not.")
@click.pass_obj
def doctor(registry: Registry, /, as_json: bool, offline: bool, build_kernels: bool) -> int:
    """Check this machine and what is installed; status 1 where something that was asked for cannot work."""
    if build_kernels:
        path = str(_built_kernels())
        click.echo(json.dumps({"kernels": path}) if as_json else path)
        return 0
    checks = [check for section in _sections(registry, offline) for check in section()]
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            mark = {True: "ok   ", False: "WRONG", None: "     "}[check.ok]
            click.echo(f"{mark} {check.name:<18} {check.detail}")
            if check.fix:
                click.echo(f"      {'':<18} try: {check.fix}")
    return int(any(check.ok is False for check in checks))


def _built_kernels() -> Path:
    """Compile the CPU kernels unless they exist, and return their file. Raises `TorchchatError` if that fails."""
    from torchchat_core import kernels
    from torchchat_core.cli.progress_bars import shown_progress
    from torchchat_core.kernels.build import library_path

    with shown_progress():
        reason = kernels.load()
    if reason is not None:
        raise TorchchatError(reason)
    return library_path()


def _sections(registry: Registry, offline: bool) -> list[Callable[[], Iterator[Check]]]:
    return [python_checks, torch_checks, machine_checks, lambda: network_checks(offline),
            lambda: plugin_checks(registry), lambda: setting_checks(registry)]


def python_checks() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", sys.version_info[:2] >= MINIMUM_PYTHON, f"{version}, {sys.executable}",
                None if sys.version_info[:2] >= MINIMUM_PYTHON else "install Python 3.11 or later")
    yield Check("torchchat", None, f"{__version__}, {Path(__file__).parent.parent}")


def torch_checks() -> Iterator[Check]:
    """PyTorch, the devices that it sees, and core's kernels for it."""
    try:
        import torch
    except Exception as error:  # a broken build raises whatever it meets first
        yield Check("torch", False, f"cannot be imported: {error}",
                    f"{sys.executable} -P -m pip install --upgrade torch")
        return
    yield Check("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads, "
                               f"CPU kernels for {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Check("cuda", True, f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    if not torch.cuda.is_available():
        yield Check("cuda", None, "no device" if torch.version.cuda else "this build of PyTorch has no CUDA")
    yield Check("mps", None, "available" if torch.backends.mps.is_available() else "not available")
    yield kernel_check()


def kernel_check() -> Check:
    """Whether core's kernels for the CPU are compiled; PyTorch's own serve where they are not."""
    import torch

    from torchchat_core import kernels

    name, reason = "cpu kernels", kernels.load(building=False)
    if reason is None:
        return Check(name, True, f"compiled, with {torch.ops.torchchat.use_instructions('')} instructions")
    if reason != kernels.NOT_BUILT:
        return Check(name, None, f"{reason}; PyTorch's serve")
    try:
        compiler = kernels.find_compiler()[0]
    except TorchchatError as error:
        return Check(name, None, f"{error.message}; PyTorch's serve", error.fix)
    return Check(name, None, f"not compiled yet; {compiler} does it when a large model first needs them",
                 "torchchat doctor --build-kernels")


def machine_checks() -> Iterator[Check]:
    """Instruction sets, cores, memory, disk."""
    flags = _cpu_flags()
    yield Check("processor", None, f"{platform.machine()}, {os.cpu_count()} cores, "
                                   f"{' '.join(flag for flag in CPU_FLAGS if flag in flags) or 'flags unknown'}")
    total, available = machine_memory()
    if total:
        free = f", {available / 2**30:.1f} GiB free" if available else ""
        yield Check("memory", None, f"{total / 2**30:.1f} GiB{free}")
    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    yield Check("cache", usable, f"{cache}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free on its disk",
                None if usable else f"make {existing} writable, or set XDG_CACHE_HOME")


def network_checks(offline: bool) -> Iterator[Check]:
    """Whether the hub can be reached. Being offline is no fault."""
    if offline:
        yield Check("network", None, "not tried")
        return
    try:
        host, port = hub_endpoint()
    except TorchchatError as error:
        yield Check("network", False, error.message, error.fix)
        return
    fault = connection_fault(host, port)
    if fault is None:
        yield Check("network", True, f"{host} can be reached")
    else:
        yield Check("network", None, f"{host} cannot be reached: {fault}")


def plugin_checks(registry: Registry) -> Iterator[Check]:
    """Each plugin's state, and whether what its distribution requires is there."""
    for plugin in registry.plugins:
        if plugin.state == "failed":
            yield Check(plugin.qualified_name, False, plugin.reason or "failed",
                        f"{sys.executable} -P -m pip install --force-reinstall {plugin.distribution}")
        elif plugin.state == "disabled":
            yield Check(plugin.qualified_name, None, "left out")
        else:
            yield from requirement_checks(plugin)
    if not any(info.kind == "executor" for plugin in registry.plugins for info in plugin.offers):
        yield Check("executor", False, "none is installed; no model can run",
                    registry.how_to_get("executors"))


def requirement_checks(plugin: Plugin) -> Iterator[Check]:
    """One line for a plugin whose requirements are met, else one for each that is not."""
    wrong = list(_unmet(plugin.distribution))
    for requirement, found in wrong:
        yield Check(plugin.qualified_name, False, f"needs {requirement}; {found}",
                    f"{sys.executable} -P -m pip install '{requirement}'")
    if not wrong:
        names = ", ".join(f"{info.name} ({info.kind})" for info in plugin.offers if info.kind != "command")
        core = plugin.distribution == CORE
        yield Check(plugin.qualified_name, True, f"{plugin.version}" + ("" if core else f": {names}"))


def _unmet(distribution: str) -> Iterator[tuple[str, str]]:
    """(requirement, what is there instead) for each requirement of a distribution that is not met."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for text in declared:
        try:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
        except ValueError as error:  # of packaging, for a requirement that is none
            yield text, f"which cannot be read: {str(error).splitlines()[0]}"
            continue
        requirement.marker = None
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield str(requirement), "it is not installed"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield str(requirement), f"{found} is installed"


def setting_checks(registry: Registry) -> Iterator[Check]:
    """Whether what the user has chosen is there."""
    try:
        settings = load_settings()
    except TorchchatError as error:
        yield Check("settings", False, error.message, error.fix)
        return
    yield Check("settings", None, f"{config_path()}{'' if config_path().exists() else ' (not there)'}")
    for key, value in settings.values.items():
        reason = _setting_fault(key, value, registry)
        yield Check(f"  {key}", reason is None, f"{value} (from {settings.origins[key]})"
                    + (f": {reason}" if reason else ""),
                    _setting_fix(key, settings.origins[key]) if reason else None)
    yield from _chosen_combination(settings, registry)


def _setting_fix(key: str, origin: str) -> str:
    from_environment = key in KEYS and origin == variable(key)
    return f"unset {origin}, or set it to another value" if from_environment else f"torchchat config set {key} VALUE"


def _chosen_combination(settings: Settings, registry: Registry) -> Iterator[Check]:
    """Whether the executor, device and dtype that were chosen go together, and the executor can be imported."""
    from torchchat_core.pipeline import choose_device, choose_dtype
    from torchchat_core.specs import ExecutorInfo
    from torchchat_core.support import choose_executor

    name = settings.get("executor")
    if name is None or name == "auto":
        return
    try:
        import torch

        device = choose_device(settings.get("device") or "fast")
        choose_executor(name, device, choose_dtype(settings.get("dtype"), device, torch.float32), (), registry)
        registry.find(ExecutorInfo, name).make()
    except TorchchatError as error:
        yield Check("  chosen", False, error.message, error.fix)


def _setting_fault(key: str, value: str, registry: Registry) -> str | None:
    from torchchat_core.pipeline import choose_device

    try:
        check_setting_value(key, value, registry)
        if key == "device":
            choose_device(value)
    except TorchchatError as error:
        return error.message
    return None


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
