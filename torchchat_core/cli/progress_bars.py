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

SMALL = 1_000_000  # bytes; a file below it gets no line in a log
PATIENCE = 0.3  # seconds before bars appear: what is done by then is not worth a flicker


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
    """A task that tells its beginning and its end."""

    def __init__(self, name: str, total: int | None, unit: Unit) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount

    def set_total(self, total: int | None) -> None:
        self._total = total

    @property
    def is_small(self) -> bool:
        return self._unit == "B" and self._total is not None and self._total < SMALL

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
    """For logs and pipes: a line when a task begins, and one when it ends, but none for small files."""

    def started(self, name: str, total: int | None, unit: Unit) -> LineTask:
        task = LineTask(name, total, unit)
        if not task.is_small:
            click.echo(task.first_line(), err=True)
        return task

    def finished(self, task: Task, completed: bool) -> None:
        if isinstance(task, LineTask) and not task.is_small:
            click.echo(task.last_line(completed), err=True)

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
