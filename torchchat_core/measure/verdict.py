"""A verification in words, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from torchchat_core.measure.limits import RECIPES
from torchchat_core.measure.verifying import Side, Verification


def verification_lines(found: Verification) -> Iterator[str]:
    """The whole report as text."""
    agreement = found.agreement
    yield f"first:   {found.first}"
    yield f"second:  {found.second}"
    yield f"{found.text.description}: {agreement.positions} positions in windows of {found.window}"
    yield ""
    place = agreement.largest_at
    yield f"logits           largest difference {agreement.largest_difference:.3g} ({place.way}, passage " \
          f"{place.passage + 1}, position {place.position}), mean {agreement.mean_difference:.3g}"
    yield f"KL divergence    mean {agreement.mean_kl:.3g}, 99th percentile {agreement.p99_kl:.3g} nats"
    yield f"likeliest token  the same at {100 * agreement.top_1:.2f} %; of the five likeliest " \
          f"{100 * agreement.top_5:.2f} % in common"
    yield f"greedy           {agreement.greedy_agreed} of {agreement.greedy_tokens} tokens before they part"
    yield from _difference_lines(found)
    yield ""
    if found.agrees:
        yield f"they agree, by the limits for {limits_text(found)}"
    else:
        yield f"they DISAGREE, by the limits for {limits_text(found)}:"
        yield from (f"  {each}" for each in found.objections)
        if found.limits.kind == RECIPES.kind:
            yield "  their weights are not the same: what quantising costs is told by torchchat quantize MODEL --report"


def _difference_lines(found: Verification) -> Iterator[str]:
    apart = found.agreement.first_difference
    if apart is None or found.candidates is None:
        return
    yield f"                 first at position {apart.place.position}: " + " or ".join(
        f"{text!r} (token {token}, {gap:.3g} above the other)"
        for text, token, gap in zip(found.candidates, apart.tokens, apart.gaps, strict=True))


def limits_text(found: Verification) -> str:
    """The kind of pair, and what was looked at."""
    limits = found.limits
    known = [("difference", limits.largest_difference), ("mean KL", limits.mean_kl), ("p99 KL", limits.p99_kl)]
    most = [f"{name} {limit:g}" for name, limit in known if limit is not None]
    least = [] if limits.top_1 is None else [f"same top-1 {100 * limits.top_1:g} %"]
    return f"{limits.kind}: {', '.join([*most, *least])}"


def as_json(found: Verification) -> dict[str, Any]:
    """Every figure, unrounded; what is infinite is null."""
    agreement = dataclasses.asdict(found.agreement)
    for name, value in agreement.items():
        if isinstance(value, float) and not math.isfinite(value):
            agreement[name] = None
    if agreement["first_difference"] is not None:
        agreement["first_difference"]["texts"] = found.candidates
    return {"agree": found.agrees, "objections": found.objections, "first": _side(found.first),
            "second": _side(found.second), "same_tokens": found.same_tokens,
            "same_prompts": found.same_prompts, "window": found.window,
            "text": {"name": found.text.name, "characters": found.text.read, "of_characters": found.text.whole},
            **agreement, "limits": dataclasses.asdict(found.limits)}


def _side(side: Side) -> dict[str, Any]:
    return dataclasses.asdict(side)
