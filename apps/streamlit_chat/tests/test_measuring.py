"""Measurements in the background, and what they draw."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tc_streamlit_chat.jobs import Jobs
from tc_streamlit_chat.pages.measure import speed
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import load_registry
from torchchat_core.progress import task

WAIT = 120


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    found = Jobs()
    yield found
    found.close()


def test_speed_is_measured_and_what_cannot_run_is_listed(jobs: Jobs) -> None:
    work = speed(ModelRequest(), ["eager", "nonsense"], [None], load_registry())
    job = jobs.start("a", "speed", work)
    assert job.done.wait(WAIT)
    assert job.error is None
    assert "Decoding, tokens/s" in job.result
    assert "Not measured" in job.result


def test_they_run_one_after_the_other_and_tell_how_far_they_are(jobs: Jobs) -> None:
    running, go_on, order = threading.Event(), threading.Event(), []

    def first(_: Callable[[], bool]) -> str:
        with task("counting", total=4) as counted:
            counted.advance(1)
            running.set()
            assert go_on.wait(WAIT)
        order.append("first")
        return "done"

    one = jobs.start("a", "one", first)
    two = jobs.start("b", "two", lambda _: order.append("second"))
    assert running.wait(WAIT)
    assert (one.status.text, one.status.share) == ("counting", 0.25)
    with pytest.raises(TorchchatError, match="is running here"):
        jobs.start("a", "again", first)
    go_on.set()
    assert one.done.wait(WAIT)
    assert two.done.wait(WAIT)
    assert (one.result, order) == ("done", ["first", "second"])


def test_one_that_is_given_up_ends_at_its_next_step_and_faults_are_told(jobs: Jobs) -> None:
    begun = threading.Event()

    def endless(_: Callable[[], bool]) -> Any:
        with task("turning") as turned:
            while True:
                begun.set()
                turned.advance(1)

    def faulty(_: Callable[[], bool]) -> Any:
        raise ZeroDivisionError("of no use")

    job = jobs.start("a", "endless", endless)
    assert begun.wait(WAIT)
    job.stop()
    assert job.done.wait(WAIT)
    assert (job.result, job.error) == (None, None)
    fault = jobs.start("b", "faulty", faulty)
    assert fault.done.wait(WAIT)
    assert fault.error is not None
    assert "of no use" in fault.error.message
