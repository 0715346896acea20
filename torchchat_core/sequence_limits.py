"""What every executor refuses of its sessions, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from torchchat_core.errors import TorchchatError


def check_append(count: int, length: int, limit: int, closed: bool, fix: str) -> None:
    """Raises `TorchchatError` where a session that holds `length` tokens does not take `count` more; `fix` says how one
    that takes more is had."""
    if closed:
        raise TorchchatError("the session was closed")
    if count < 1:
        raise TorchchatError("there are no tokens to append")
    if length + count > limit:
        raise TorchchatError(f"the sequence would have {length + count} tokens; its limit is {limit}",
                             f"shorten the prompt, or {fix}")


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises `TorchchatError` for a token that the model does not have."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        outside = next(token for token in tokens if not 0 <= token < vocab_size)
        raise TorchchatError(f"token {outside} is outside the model's vocabulary of {vocab_size}",
                             "the tokenizer belongs to another model")


def check_batch(sessions: Sequence[object], tokens: Sequence[object]) -> None:
    """Raises `TorchchatError` for what is not one token, or one prompt, for each of several different sessions."""
    different = len(set(map(id, sessions))) == len(sessions)
    if not sessions or not different or len(sessions) != len(tokens):
        raise TorchchatError(f"a batch of {len(sessions)} sessions and {len(tokens)} tokens or prompts: it takes "
                             "one for each of several different sessions")


def session_limit(asked: int | None, max_context: int, owner: str, fix: str) -> int:
    """The tokens that a session may hold: `asked`, or what its `owner` takes. Raises `TorchchatError` for others."""
    limit = max_context if asked is None else asked
    if not 1 <= limit <= max_context:
        raise TorchchatError(f"a sequence of {limit} tokens was asked for; {owner} takes 1 to {max_context}", fix)
    return limit
