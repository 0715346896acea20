"""Measure how much CPU time other programs use during a benchmark."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WARNING_SHARE = 0.1  # of all cores
IDLE = (3, 4)  # the columns "idle" and "iowait" of /proc/stat
COUNTED = 8  # columns up to "steal", the time taken by other virtual machines; later columns are included in these


@dataclass(frozen=True)
class Usage:
    """CPU time in seconds since a fixed point in the past."""

    all: float  # of the whole machine, including idle cores
    idle: float
    own: float  # of this process and its finished children


def usage(stat: Path = Path("/proc/stat"), own: Callable[[], float] | None = None) -> Usage | None:
    """Return the CPU time used so far; None if the system does not report it."""
    try:
        name, *columns = stat.read_text("ascii").partition("\n")[0].split()
        ticks = [int(column) / os.sysconf("SC_CLK_TCK") for column in columns[:COUNTED]]
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(ticks) < COUNTED:
        return None
    return Usage(sum(ticks), sum(ticks[column] for column in IDLE), (own or _own)())


def busy_warning(before: Usage | None, after: Usage | None, cores: int | None = None) -> str | None:
    """Return a warning if other programs used enough CPU time between the two readings to distort rates; else None."""
    if before is None or after is None or after.all <= before.all:
        return None
    cores = cores or os.cpu_count() or 1
    others = (after.all - before.all) - (after.idle - before.idle) - (after.own - before.own)
    used = cores * others / (after.all - before.all)
    if used < WARNING_SHARE * cores:
        return None
    return (f"other programs used {used:.1f} of {cores} core{'' if cores == 1 else 's'} during the measurement, so "
            "the rates are too low. Compare only rates of one run, or stop those programs and measure again")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
