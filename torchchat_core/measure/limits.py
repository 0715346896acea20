"""When two models count as the same: limits for each kind of pair, from what is measured where both are right.

docs/measuring.md says what was measured, and what faults come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.agreement import Agreement


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may differ. A None is not looked at."""

    kind: str  # what kind of pair they are for
    largest_difference: float | None  # of logits
    mean_kl: float | None  # nats
    p99_kl: float | None  # nats
    top_1: float | None  # at least

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not 0 <= value <= 1e9:
                raise TorchchatError(f"the limit {each.name} is {value:g}; it has to be 0 or more")

    def changed(self, **asked: float | None) -> Limits:
        """With those that are not None in place of our own."""
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return replace(self, **given) if given else self


EXACT = Limits(kind="float32", largest_difference=5e-4, mean_kl=2e-10, p99_kl=2e-9, top_1=0.995)
HALF = Limits(kind="16 bits", largest_difference=None, mean_kl=2e-3, p99_kl=2e-2, top_1=0.95)
QUANTISED = Limits(kind="the same recipe", largest_difference=None, mean_kl=5e-3, p99_kl=5e-2, top_1=0.93)
RECIPES = Limits(kind="different recipes, or dtypes under one", largest_difference=None, mean_kl=0.1, p99_kl=1.0,
                 top_1=0.85)


def limits_for(dtypes: tuple[str, str], recipes: tuple[str | None, str | None]) -> Limits:
    """Those for a pair, from the dtypes that they compute in and what their layers were quantised by, as of
    `pipeline.OpenedModel`."""
    if recipes[0] != recipes[1] or (recipes[0] and dtypes[0] != dtypes[1]):  # other weights in either case
        return RECIPES
    if recipes[0]:
        return QUANTISED
    return EXACT if dtypes == ("fp32", "fp32") else HALF


def objections(found: Agreement, limits: Limits) -> Iterator[str]:
    """One sentence for each limit that is passed; none where the two agree."""
    for name, words, value, limit in [
        ("largest_difference", "the largest difference of logits", found.largest_difference, limits.largest_difference),
        ("mean_kl", "the mean KL divergence", found.mean_kl, limits.mean_kl),
        ("p99_kl", "the KL divergence at the 99th percentile", found.p99_kl, limits.p99_kl),
    ]:
        if limit is not None and not value <= limit:
            yield f"{words} is {value:.3g}; the limit is {limit:g} (--max-{_flag(name)})"
    if limits.top_1 is not None and not found.top_1 >= limits.top_1:
        yield f"the same token is likeliest at {100 * found.top_1:.2f} % of the positions; it has to be " \
              f"{100 * limits.top_1:g} % (--min-top-1)"


def _flag(name: str) -> str:
    return {"largest_difference": "difference"}.get(name, name.replace("_", "-"))
