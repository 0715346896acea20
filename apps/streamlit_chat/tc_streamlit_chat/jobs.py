"""Measurements in the background: one after the other, since two at once would measure each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tc_streamlit_chat.local import Shown
from tc_streamlit_chat.questions import Event, Status
from torchchat_core.errors import TorchchatError
from torchchat_core.progress import shown_by

Work = Callable[[Callable[[], bool]], Any]  # of a function that says whether to give up


class GivenUp(Exception):
    """Somebody does not want the result any more."""


@dataclass(eq=False)
class Job:
    """One measurement: waiting, running, or done with a result or an error."""

    title: str
    work: Work
    place: str  # of the page that wants it
    status: Status = field(default_factory=lambda: Status("waiting for the measurement before it"))
    result: Any = None
    error: TorchchatError | None = None
    done: threading.Event = field(default_factory=threading.Event)
    _given_up: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Gives it up at the next step."""
        self._given_up.set()

    def report(self, event: Event) -> None:
        if isinstance(event, Status):
            self.status = event
        if self._given_up.is_set():
            raise GivenUp

    def run(self) -> None:
        try:
            if not self._given_up.is_set():
                self.status = Status("starting")
                with shown_by(Shown(self.report)):
                    self.result = self.work(self._given_up.is_set)
        except GivenUp:
            pass
        except TorchchatError as error:
            self.error = error
        except Exception as error:  # a fault of ours or of a plugin: the page tells it
            self.error = TorchchatError(f"{type(error).__name__}: {error}")
        finally:
            self.done.set()


class Jobs:
    """The jobs by the place that wants them, and the thread that does them."""

    def __init__(self) -> None:
        self._at: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        threading.Thread(target=self._work, name="torchchat-measurements", daemon=True).start()

    def start(self, place: str, title: str, work: Work) -> Job:
        """Raises `TorchchatError` where that place waits for one already."""
        with self._changed:
            current = self._at.get(place)
            if current is not None and not current.done.is_set():
                raise TorchchatError("a measurement is running here", "stop it, or wait for its end")
            job = Job(title, work, place)
            self._at[place] = job
            self._waiting.append(job)
            self._changed.notify()
        return job

    def at(self, place: str) -> Job | None:
        return self._at.get(place)

    def forget(self, place: str) -> None:
        job = self._at.pop(place, None)
        if job is not None:
            job.stop()

    def close(self) -> None:
        """Takes no further ones; the one that runs ends with its process."""
        with self._changed:
            self._closing = True
            for job in self._at.values():
                job.stop()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                job = self._waiting.pop(0)
            job.run()
