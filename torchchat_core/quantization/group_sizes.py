"""Group sizes as recipes give them. Nothing heavy: the descriptions of quantizers check their options with it."""

from __future__ import annotations

from collections.abc import Sequence

from torchchat_core.errors import TorchchatError


def check_group_size(value: object, known: Sequence[int]) -> None:
    """Raises `TorchchatError` for a whole number that is none of the `known` sizes; other types are told elsewhere."""
    if isinstance(value, int) and not isinstance(value, bool) and value not in known:
        words = {0: "0 (one scale a row)"}
        listed = ", ".join(words.get(size, str(size)) for size in known)
        raise TorchchatError(f"groupsize is {value}; it has to be one of {listed}")
