"""Progress bars with rich, whose import takes a twenty-fifth of a second: see `progress_bars`."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.table import Column
from rich.text import Text

from torchchat_core.amounts import bytes_text
from torchchat_core.cli.progress_bars import amount_text
from torchchat_core.progress import Task, Unit


class AmountColumn(ProgressColumn):
    """How far a task is and, for bytes, how fast it goes."""

    def render(self, task: RichTask) -> Text:
        unit: Unit = task.fields["unit"]
        total = None if task.total is None else int(task.total)
        text = amount_text(int(task.completed), total, unit)
        return Text(f"{text}, {bytes_text(int(task.speed))}/s" if unit == "B" and task.speed else text)


class BarTask:
    """One bar. May be advanced from any thread: rich locks."""

    def __init__(self, progress: Progress, task_id: TaskID) -> None:
        self._progress, self.task_id = progress, task_id

    def advance(self, amount: int) -> None:
        self._progress.update(self.task_id, advance=amount)

    def set_total(self, total: int | None) -> None:
        self._progress.tasks[self._progress.task_ids.index(self.task_id)].total = total


class RichBars:
    """The bars of one display on standard error; they leave nothing behind.

    They appear `patience` seconds after the first one was added, if any is left then.
    """

    def __init__(self, patience: float) -> None:
        name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis",
                                                                                  ratio=2))
        self._progress = Progress(
            name, BarColumn(bar_width=None, table_column=Column(ratio=1)), AmountColumn(Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=Console(stderr=True), transient=True, expand=True, redirect_stdout=False,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._timer = threading.Timer(patience, self._appear)
        self._timer.daemon = True
        self._timer.start()

    def add(self, name: str, total: int | None, unit: Unit) -> BarTask:
        return BarTask(self._progress, self._progress.add_task(name, total=total, unit=unit))

    def take_away(self, task: Task) -> None:
        if isinstance(task, BarTask):
            self._progress.remove_task(task.task_id)

    def close(self) -> None:
        """Takes the bars off the terminal."""
        with self._lock:
            self._closed = True
            self._timer.cancel()
            self._progress.stop()

    def _appear(self) -> None:
        with self._lock:
            if not self._closed:
                self._progress.start()
