"""The figures of an answer, and what else is kept beside its text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchchat_core.generation import Statistics

ENDINGS = {"cancelled": "stopped", "length": "cut at the limit", "edited": "edited by hand"}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Counts, seconds and tokens per second; None where nobody knows."""

    new_tokens: int | None = None
    ttft_s: float | None = None  # from the question to the first token
    decode_tps: float | None = None
    prompt_tokens: int | None = None
    prefilled_tokens: int | None = None  # of the prompt, those that were not in the cache
    prefill_tps: float | None = None

    @classmethod
    def of(cls, statistics: Statistics) -> Figures:
        return cls(**{each.name: getattr(statistics, each.name) for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Details:
    """What is kept of an answer beside its text."""

    model: str = ""  # the way that it was made: "stories15M, eager, bf16"
    reason: str = ""  # why it ended: "stop", "length" or "cancelled"; "edited": by the hand of a person
    notice: str = ""
    figures: Figures = Figures()

    @property
    def line(self) -> str:
        """One line such as "42 tokens · 120.0 tokens/s · first after 0.03 s"."""
        figures, parts = self.figures, []
        if figures.new_tokens is not None:
            parts.append(f"{figures.new_tokens} token{'' if figures.new_tokens == 1 else 's'}")
        if figures.decode_tps is not None:
            parts.append(f"{figures.decode_tps:.1f} tokens/s")
        if figures.ttft_s is not None:
            soon = figures.ttft_s < 0.01
            parts.append(f"first after {1000 * figures.ttft_s:.1f} ms" if soon else
                         f"first after {figures.ttft_s:.2f} s")
        if self.reason in ENDINGS:
            parts.append(ENDINGS[self.reason])
        return " · ".join(parts)

    @property
    def table(self) -> list[tuple[str, str]]:
        """Everything that is known, with units."""
        figures, rows = self.figures, [("made by", self.model)] if self.model else []
        if figures.prompt_tokens is not None:
            known = figures.prefilled_tokens is not None
            rest = f", {figures.prefilled_tokens} of them not in the cache before" if known else ""
            rows.append(("prompt", f"{figures.prompt_tokens} tokens{rest}"))
        if figures.prefill_tps is not None:
            rows.append(("prefill", f"{figures.prefill_tps:.1f} tokens/s"))
        if figures.ttft_s is not None:
            rows.append(("first token", f"after {figures.ttft_s:.3f} s"))
        if figures.new_tokens is not None:
            rows.append(("answer", f"{figures.new_tokens} tokens"))
        if figures.decode_tps is not None:
            rows.append(("decode", f"{figures.decode_tps:.1f} tokens/s"))
        return rows

    @classmethod
    def from_json(cls, text: str) -> Details:
        """What was kept; nothing in place of what is damaged."""
        try:
            found = json.loads(text)
            figures = found.pop("figures")
            texts: dict[str, Any] = {name: str(value) for name, value in found.items()}
            return replace(cls(**texts), figures=Figures(**{name: _number(value) for name, value in figures.items()}))
        except (ValueError, TypeError, AttributeError, KeyError):
            return cls()


def _number(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
        return value
    raise TypeError(value)
