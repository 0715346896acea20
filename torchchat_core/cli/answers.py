"""How an answer and its figures are shown: to a person, and as JSON."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from torchchat_core.generation import FinishedEvent, Statistics

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def answer_json(finished: FinishedEvent) -> dict[str, Any]:
    """One answer as `--json` prints it."""
    return {"text": finished.text, "token_ids": list(finished.token_ids), "finish_reason": finished.reason,
            "stats": asdict(finished.statistics)}


def printable(text: str) -> str:
    """Text without the control characters that would move a terminal's cursor or change its settings."""
    return CONTROL.sub("", text)


def statistics_line(statistics: Statistics) -> str:
    """One line such as "42 tokens · 120 tokens/s · first after 0.03 s"."""
    parts = [f"{statistics.new_tokens} tokens"]
    if statistics.decode_tps is not None:
        parts.append(f"{statistics.decode_tps:.1f} tokens/s")
    parts.append(f"first after {statistics.ttft_s:.2f} s")
    return " · ".join(parts)


def statistics_table(statistics: Statistics) -> list[tuple[str, str]]:
    """Every figure with its unit, as (name, value)."""

    def rate(value: float | None) -> str:
        return "too few tokens to say" if value is None else f"{value:.1f} tokens/s"

    return [
        ("prompt", f"{statistics.prompt_tokens} tokens, {statistics.prefilled_tokens} of them not in the cache before"),
        ("prefill", rate(statistics.prefill_tps)),
        ("first token", f"after {statistics.ttft_s:.3f} s"),
        ("answer", f"{statistics.new_tokens} tokens"),
        ("decode", rate(statistics.decode_tps)),
        ("peak memory", f"{statistics.peak_rss_bytes / 2**20:.0f} MiB"),
    ]
