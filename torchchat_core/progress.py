"""How long-running stages say how far they are, to whoever wants to show it. The default is silence.

    with progress.task("model.safetensors", total=size, unit="B") as task:
        for block in blocks:
            task.advance(len(block))

A frontend shows it with `with progress.shown_by(reporter):`. It holds for the thread (the context) that it is set in;
a stage that works in threads of its own takes the task along, which may be advanced from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol

Unit = Literal["B", "steps"]


class Task(Protocol):
    """One thing that takes time."""

    def advance(self, amount: int) -> None:
        """So much more is done, in the task's unit. Negative where work was lost and begins again."""

    def set_total(self, total: int | None) -> None:
        """So much there is in all; None while nobody knows."""


class Reporter(Protocol):
    """What shows tasks. Both methods may be called from any thread."""

    def started(self, name: str, total: int | None, unit: Unit) -> Task: ...

    def finished(self, task: Task, completed: bool) -> None:
        """The task has ended; not `completed` where an exception ended it."""


class Silence:
    """A reporter, and a task, that show nothing."""

    def started(self, name: str, total: int | None, unit: Unit) -> Task:  # noqa: ARG002
        return self

    def finished(self, task: Task, completed: bool) -> None: ...

    def advance(self, amount: int) -> None: ...

    def set_total(self, total: int | None) -> None: ...


_reporter: ContextVar[Reporter] = ContextVar("torchchat_progress", default=Silence())  # noqa: B039 - it has no state


@contextmanager
def shown_by(reporter: Reporter) -> Iterator[None]:
    """Within it, tasks of this context are shown by `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def task(name: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Task]:
    """A task that is shown while the block runs."""
    reporter = _reporter.get()
    started = reporter.started(name, total, unit)
    completed = False
    try:
        yield started
        completed = True
    finally:
        reporter.finished(started, completed)
