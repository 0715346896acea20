"""Report the memory use of this process and the memory of the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Memory limits of a container: cgroups version 2, then version 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def peak_rss_bytes() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say."""
    if sys.platform == "linux":  # getrusage would count what the parent held when it started this process
        _, _, rest = Path("/proc/self/status").read_bytes().partition(b"VmHWM:")
        if rest:
            return int(rest.split(maxsplit=1)[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> tuple[int, int]:
    """Return the total and the available memory of this machine in bytes; 0 if the system does not report it.

    A container's limit is taken into account.
    """
    total, available = _system_memory()
    for file in CONTAINER_LIMITS:
        try:
            limit = int(file.read_text(encoding="ascii"))
        except (OSError, ValueError):  # no container, or "max"
            continue
        if 0 < limit < total:
            return limit, min(available, limit)
    return total, available


def _system_memory() -> tuple[int, int]:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return total, available
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
    except (AttributeError, ValueError, OSError):
        return 0, 0
