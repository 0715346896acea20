"""What other programs take of the processor while this one measures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WORTH_A_WARNING = 0.1  # of all cores
IDLE = (3, 4)  # the columns "idle" and "iowait" of /proc/stat
COUNTED = 8  # its columns up to "steal", which is what other virtual machines take; the rest is counted in these


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time since some beginning: of the whole machine, idle cores included, and of parts of it."""

    all: float
    idle: float
    own: float  # of this process and of those that it waited for


def usage(stat: Path = Path("/proc/stat"), own: Callable[[], float] | None = None) -> Usage | None:
    """Return the processor time used so far; None where the system does not tell it."""
    try:
        name, *columns = stat.read_text("ascii").partition("\n")[0].split()
        ticks = [int(column) / os.sysconf("SC_CLK_TCK") for column in columns[:COUNTED]]
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(ticks) < COUNTED:
        return None
    return Usage(sum(ticks), sum(ticks[column] for column in IDLE), (own or _own)())


def busy_warning(before: Usage | None, after: Usage | None, cores: int | None = None) -> str | None:
    """Return what other programs used of the processor between the two, where it spoils rates; else None."""
    if before is None or after is None or after.all <= before.all:
        return None
    cores = cores or os.cpu_count() or 1
    others = (after.all - before.all) - (after.idle - before.idle) - (after.own - before.own)
    used = cores * others / (after.all - before.all)
    if used < WORTH_A_WARNING * cores:
        return None
    return (f"other programs used {used:.1f} of {cores} core{'' if cores == 1 else 's'} during the measurement; "
            "the rates are too low. Compare only rates of one run, or end those programs and measure again")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
