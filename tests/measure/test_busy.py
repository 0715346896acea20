"""A measurement warns if other programs use the processor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchchat_core.measure.busy import Usage, busy_warning, usage


def test_guest_time_is_not_counted_twice(tmp_path: Path) -> None:
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    stat.write_text("cpu  " + " ".join(str(count * ticks) for count in (10, 1, 2, 80, 5, 0, 1, 1, 7, 7)) + "\ncpu0 1\n")
    assert usage(stat, lambda: 6.0) == Usage(all=100.0, idle=85.0, own=6.0)


@pytest.mark.parametrize("content", [None, "", "cpu\n", "cpu 1 2 3\n", "cpu a b c d e f g h\n",
                                     "intr 1 2 3 4 5 6 7 8\n"])
def test_a_system_without_usage_figures_gives_none(content: str | None, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    assert usage(stat) is None
    assert busy_warning(usage(stat), Usage(1, 0, 0)) is None


def test_usage_of_other_programs_is_reported_in_cores() -> None:
    before = Usage(all=100, idle=50, own=10)
    text = busy_warning(before, Usage(all=120, idle=51, own=16), cores=2)
    assert text is not None
    assert text.startswith("other programs used 1.3 of 2 cores during the measurement, so the rates are too low.")


@pytest.mark.parametrize("after", [Usage(all=120, idle=60, own=20), Usage(all=120, idle=55, own=24),
                                   Usage(all=100, idle=50, own=10)])
def test_a_quiet_machine_gives_no_warning(after: Usage) -> None:
    assert busy_warning(Usage(all=100, idle=50, own=10), after, cores=2) is None
