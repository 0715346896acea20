"""Where the time of a token goes, by torch.profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.measure.tables import aligned
from torchchat_core.specs import Session

PREFILL, DECODE = "torchchat: prefill", "torchchat: decode"
ROWS = 12  # operators in the table


class LabelledSession:
    """A session whose prefills and decoding steps stand in the trace under names of their own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.prefilled = self.decoded = 0  # tokens

    @property
    def length(self) -> int:
        return self._session.length

    @property
    def limit(self) -> int:
        return self._session.limit

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        self.prefilled += len(tokens)
        with record_function(PREFILL):
            return self._session.prefill(tokens)

    def decode(self, token: int) -> Tensor:
        self.decoded += 1
        with record_function(DECODE):
            return self._session.decode(token)

    def truncate(self, length: int) -> None:
        self._session.truncate(length)

    def close(self) -> None:
        self._session.close()


@dataclass
class Profile:
    """What was recorded while the block of `profiled` ran."""

    session: LabelledSession
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # label -> seconds
    operators: dict[str, tuple[int, float]] = field(default_factory=dict)  # while decoding: calls, seconds of their own

    def lines(self) -> Iterator[str]:
        """A short table of where the time went."""
        session, decode = self.session, self.phases.get(DECODE, 0.0)
        prefill = self.phases.get(PREFILL, 0.0)
        yield f"prefill  {1000 * prefill:.1f} ms for {session.prefilled} tokens"
        if session.decoded:
            each = 1000 * decode / session.decoded
            yield f"decode   {1000 * decode:.1f} ms for {session.decoded} tokens, {each:.3f} ms each"
        rest = max(0.0, self.seconds - prefill - decode)
        yield f"the rest {1000 * rest:.1f} ms: sampling, text, printing"
        if session.decoded and decode:
            yield ""
            yield from aligned([("of a decoded token", "calls", "ms", "share"), *self._rows(decode)])
        yield "the profiler itself slows small operators down: speeds are measured by torchchat bench"

    def _rows(self, decode: float) -> Iterator[tuple[str, str, str, str]]:
        steps = self.session.decoded
        ordered = sorted(self.operators.items(), key=lambda each: -each[1][1])
        shown, others = ordered[:ROWS], ordered[ROWS:]
        if others:
            total = sum(calls for _, (calls, _) in others), sum(seconds for _, (_, seconds) in others)
            shown.append((f"{len(others)} other operators", total))
        outside = decode - sum(seconds for _, (_, seconds) in ordered)
        for name, (calls, seconds) in shown:
            yield name[:60], f"{calls / steps:.3g}", f"{1000 * seconds / steps:.3f}", f"{100 * seconds / decode:.1f} %"
        yield "outside of operators: Python, a runtime's own code", "", f"{1000 * max(0.0, outside) / steps:.3f}", \
            f"{100 * max(0.0, outside) / decode:.1f} %"


@contextmanager
def profiled(session: Session, path: Path) -> Iterator[Profile]:
    """Records what runs in the block, over `Profile.session`; writes a Chrome trace to `path` (.json or .json.gz).

    Raises `TorchchatError` where the trace cannot be written.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    found = Profile(session=LabelledSession(session))
    with profile(activities=activities) as recorder:
        started = time.perf_counter()
        yield found
        found.seconds = time.perf_counter() - started
    _add_up(found, recorder.events() or [])
    try:
        recorder.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise TorchchatError(f"cannot write the trace to {quoted_path(str(path))}: {error}") from None


def _add_up(found: Profile, events: Sequence[Any]) -> None:
    phases: dict[str, float] = defaultdict(float)
    operators: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in events:
        if event.name in (PREFILL, DECODE):
            phases[event.name] += event.cpu_time_total / 1e6
        elif _is_within(event, DECODE):
            calls, seconds = operators[event.name]
            own = max(event.self_cpu_time_total, event.self_device_time_total) / 1e6
            operators[event.name] = calls + 1, seconds + own
    found.phases, found.operators = dict(phases), dict(operators)


def _is_within(event: Any, label: str) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == label:
            return True
        parent = parent.cpu_parent
    return False
