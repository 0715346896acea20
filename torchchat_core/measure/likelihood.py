"""Log-likelihoods of continuations, over one session that keeps what requests have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.generation import PREFILL_CHUNK, TokenSequence
from torchchat_core.measure.perplexity import SCORED, check_logits
from torchchat_core.specs import LoadedModel


@dataclass(frozen=True)
class Request:
    """Tokens, and what is to be told of those that continue them."""

    context: tuple[int, ...]  # at least one
    continuation: tuple[int, ...]

    def within(self, limit: int) -> Request:
        """With as much of the end of the context as a sequence of `limit` tokens holds.

        Raises `TorchchatError` where the continuation alone does not fit.
        """
        kept = limit + 1 - len(self.continuation)  # the last token is predicted, and not held
        if kept < 1:
            raise TorchchatError(f"a continuation of {len(self.continuation)} tokens is to be scored; the model holds "
                                 f"{limit}", "leave the task out, or take a model with a longer context")
        return Request(self.context[-kept:], self.continuation)


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation."""

    log_probability: float  # nats, of all tokens together
    greedy: bool  # whether each of its tokens is the likeliest one


def likelihoods(model: LoadedModel, requests: Sequence[Request], limit: int, name: str) -> list[Likelihood]:
    """One for each request. What requests have in common from their beginnings is computed once.

    Raises `TorchchatError` for logits that are not numbers; `name` is for progress.
    """
    found: dict[int, Likelihood] = {}
    fitting = [request.within(limit) for request in requests]
    order = sorted(range(len(fitting)), key=lambda index: fitting[index].context + fitting[index].continuation)
    sequence = TokenSequence(model.session(limit))
    try:
        with progress.task(name, total=len(fitting)) as task:
            for index in order:
                found[index] = _likelihood(sequence, fitting[index])
                task.advance(1)
    finally:
        sequence.session.close()
    return [found[index] for index in range(len(fitting))]


def _likelihood(sequence: TokenSequence, request: Request) -> Likelihood:
    done = sequence.reuse(request.context)  # all but the last token at most, whose logits are needed
    for start in range(done, len(request.context) - 1, PREFILL_CHUNK):
        sequence.prefill(request.context[start : min(start + PREFILL_CHUNK, len(request.context) - 1)])
    total, greedy = 0.0, True
    for log_probability, likeliest in _scored(sequence, (request.context[-1], *request.continuation)):
        total, greedy = total + log_probability, greedy and likeliest
    return Likelihood(total, greedy)


def _scored(sequence: TokenSequence, tokens: Sequence[int]) -> Iterator[tuple[float, bool]]:
    """Appends all but the last of the tokens; of each but the first: log-probability, and whether it is likeliest."""
    for start in range(0, len(tokens) - 1, SCORED):
        fed = tokens[start : min(start + SCORED, len(tokens) - 1)]
        logits = sequence.score(fed)  # [positions, vocab]
        check_logits(logits)
        for row, token in zip(logits.double(), tokens[start + 1 :], strict=False):
            yield float(row[token] - row.logsumexp(0)), int(row.argmax()) == token
