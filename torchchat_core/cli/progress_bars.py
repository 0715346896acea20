"""What takes time, shown on standard error: bars on a terminal, lines elsewhere.

    with shown_progress():
        source.fetch(reference)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from torchchat_core.amounts import bytes_text, seconds_text
from torchchat_core.progress import Reporter, Task, Unit, shown_by

if TYPE_CHECKING:
    from torchchat_core.cli.rich_bars import RichBars

PATIENCE = 0.3  # seconds before bars appear: what is done by then is not worth a flicker
LOG_DELAY = 1.0  # seconds before a task gets lines in a log


class Display(Reporter, Protocol):
    """A reporter that holds the terminal until it is closed."""

    def close(self) -> None: ...


@contextmanager
def shown_progress() -> Iterator[None]:
    """Within it, tasks of `torchchat_core.progress` are shown. Nothing is shown where there are none."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    display: Display = Bars() if on_terminal else Lines()
    try:
        with shown_by(display):
            yield
    finally:
        display.close()


def amount_text(done: int, total: int | None, unit: Unit) -> str:
    """How far a task is: "61 MB", "1.2 GB of 2.5 GB", "3 of 32"."""
    def amount(count: int) -> str:
        return bytes_text(count) if unit == "B" else str(count)

    return amount(done) if total is None else f"{amount(done)} of {amount(total)}"


class LineTask:
    """A task that prints a line after `LOG_DELAY` seconds and another at its end; shorter tasks print nothing."""

    def __init__(self, name: str, total: int | None, unit: Unit) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._begun = self._ended = False
        self._timer = threading.Timer(LOG_DELAY, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if not self._ended and not self._begun:
                self._begun = True
                click.echo(self.first_line(), err=True)

    def end(self, completed: bool) -> None:
        """Print the last line, if the task took long enough to have a first one."""
        self._timer.cancel()
        if time.monotonic() - self._started >= LOG_DELAY:
            self._begin()  # the timer's thread may not have run yet
        with self._lock:
            self._ended = True
        if self._begun:
            click.echo(self.last_line(completed), err=True)

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount

    def set_total(self, total: int | None) -> None:
        self._total = total

    def first_line(self) -> str:
        if self._total is None:
            return f"{self._name} ..."
        size = bytes_text(self._total) if self._unit == "B" else f"{self._total} steps"
        return f"{self._name} ({size}) ..."

    def last_line(self, completed: bool) -> str:
        taken = seconds_text(time.monotonic() - self._started)
        if not completed:
            return f"{self._name} stopped at {amount_text(self._done, self._total, self._unit)} after {taken}"
        return f"{self._name} done in {taken}"


class Lines:
    """Show progress in logs and pipes: one line for a task that takes more than a second, and one when it ends."""

    def started(self, name: str, total: int | None, unit: Unit) -> LineTask:
        return LineTask(name, total, unit)

    def finished(self, task: Task, completed: bool) -> None:
        if isinstance(task, LineTask):
            task.end(completed)

    def close(self) -> None: ...


class Bars:
    """For terminals: a bar for each task that runs. Rich is imported when the first one begins."""

    def __init__(self) -> None:
        self._rich: RichBars | None = None
        self._lock = threading.Lock()

    def started(self, name: str, total: int | None, unit: Unit) -> Task:
        from torchchat_core.cli.rich_bars import RichBars

        with self._lock:
            if self._rich is None:
                self._rich = RichBars(PATIENCE)
            return self._rich.add(name, total, unit)

    def finished(self, task: Task, completed: bool) -> None:  # noqa: ARG002 - the bar goes either way
        if self._rich is not None:
            self._rich.take_away(task)

    def close(self) -> None:
        if self._rich is not None:
            self._rich.close()
