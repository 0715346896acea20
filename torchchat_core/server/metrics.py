"""Figures of the server, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping

from torchchat_core.batching import Batch, Failure, Job
from torchchat_core.generation import FinishedEvent

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # upper bounds of buckets
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[next((place for place, bound in enumerate(SECONDS) if value <= bound), len(SECONDS))] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        so_far = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{le="{bound}"}} {so_far}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {so_far}"


class Metrics:
    """Written to by the event loop and by the models' threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._counters = dict.fromkeys(HELP_OF_COUNTERS, 0)
        self._steps: dict[int, tuple[int, int]] = {}  # id of a batch -> steps and tokens counted so far
        self._first_token, self._duration = Histogram(), Histogram()

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """One answered request; `path` is that of its route."""
        with self._lock:
            self._requests[path, status] += 1
            self._duration.add(seconds)

    def observe_answer(self, job: Job, event: FinishedEvent | Failure) -> None:
        """One answer that is complete, or failed."""
        with self._lock:
            if isinstance(event, Failure):
                self._counters["torchchat_failed_answers_total"] += 1
                return
            statistics = event.statistics
            self._counters["torchchat_prompt_tokens_total"] += statistics.prompt_tokens
            self._counters["torchchat_cached_prompt_tokens_total"] += job.reused
            self._counters["torchchat_generated_tokens_total"] += statistics.new_tokens
            self._first_token.add(statistics.ttft_s)

    def observe_batch(self, batch: Batch) -> None:
        """The steps that a batch made since the last call."""
        with self._lock:
            steps, tokens = self._steps.get(id(batch), (0, 0))
            self._counters["torchchat_decode_steps_total"] += batch.steps - steps
            self._counters["torchchat_decoded_tokens_total"] += batch.decoded - tokens
            self._steps[id(batch)] = batch.steps, batch.decoded

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All figures; `gauges` maps a name to its help and its value now."""
        with self._lock:
            return "\n".join([*self._lines(gauges), ""])

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        yield from _head("torchchat_requests_total", "counter", "HTTP requests by route and status")
        for (path, status), count in sorted(self._requests.items()):
            yield f'torchchat_requests_total{{path="{path}",status="{status}"}} {count}'
        for name, words in HELP_OF_COUNTERS.items():
            yield from _head(name, "counter", words)
            yield f"{name} {self._counters[name]}"
        for name, (words, value) in gauges.items():
            yield from _head(name, "gauge", words)
            yield f"{name} {value:g}"
        for name, words, histogram in (
            ("torchchat_first_token_seconds", "from the request to the first token, waiting included",
             self._first_token),
            ("torchchat_request_seconds", "from a request's first byte to the last of its answer", self._duration),
        ):
            yield from _head(name, "histogram", words)
            yield from histogram.lines(name)


HELP_OF_COUNTERS = {
    "torchchat_prompt_tokens_total": "tokens of prompts",
    "torchchat_cached_prompt_tokens_total": "tokens of prompts that were in a cache already",
    "torchchat_generated_tokens_total": "tokens of complete answers",
    "torchchat_failed_answers_total": "answers that ended with an error",
    "torchchat_decode_steps_total": "decoding steps of models",
    "torchchat_decoded_tokens_total": "tokens of all decoding steps: divided by the steps, the mean batch",
}


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} {kind}"
