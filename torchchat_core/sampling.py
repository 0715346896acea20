"""Choosing the next token from logits: small pure functions, composed in one order for every runtime.

logits -> bias -> repetition, presence and frequency penalty -> temperature -> top-k -> top-p -> min-p -> draw

Temperature 0 takes the largest logit after bias and penalties; of equal ones, the lowest id. A draw walks the
remaining tokens by rising id with one random number from `philox_uniform`, so that the same logits and the same
seed give the same token on every machine. docs/sampling.md specifies it for other implementations.

It computes with numpy: a row is too short for several threads, and PyTorch's would still wait for work, on the same
cores, when the next token is computed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.generation_options import SamplingOptions

Row = NDArray[np.float64]  # logits, [vocab] or of the tokens that are left
Positions = NDArray[np.intp]  # in a row, rising
BLOCK = 32  # logits of which the largest is looked for, on the way to the k largest


class Sampler:
    """Draws the tokens of one answer. `stream` keeps several answers with one seed apart (0, 1, 2, ...).

    `prompt` are the ids that the repetition penalty counts beside those of the answer.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int] = (), stream: int = 0) -> None:
        self.options = options
        self.seed = secrets.randbits(63) if options.seed is None else options.seed
        self._stream = stream
        self._prompt = set(prompt)
        self._counts: dict[int, int] = {}  # tokens of the answer
        self._step = 0
        self._row: Row = np.empty(0, np.float64)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether `choose` is no more than looking for the largest logit."""
        options = self.options
        return (options.temperature == 0.0 and not options.logit_bias and options.repetition_penalty == 1.0
                and not options.presence_penalty and not options.frequency_penalty)

    def choose(self, logits: Tensor) -> int:
        """The next token for logits [vocab]; it is counted as part of the answer.

        Raises `TorchchatError` where the logits hold NaN, or where nothing is left to choose from.
        """
        token = _likeliest(numbers(logits)) if self.takes_the_likeliest else self._chosen(logits)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._step += 1
        return token

    def _chosen(self, logits: Tensor) -> int:
        row = self._processed(logits)
        best = _likeliest(row)
        if self.options.temperature == 0.0:
            return best
        row -= row[best]  # now no temperature can make it overflow, but for -inf
        with np.errstate(over="ignore"):
            row /= self.options.temperature
        tokens = None
        for keep in self._filters():
            kept = keep(row)
            row, tokens = row[kept], kept if tokens is None else tokens[kept]
        position = draw(np.exp(row, out=row), philox_uniform(self.seed, self._stream, self._step))
        return position if tokens is None else int(tokens[position])

    def _processed(self, logits: Tensor) -> Row:
        options, given = self.options, numbers(logits)
        if len(self._row) != len(given):  # made once: to get such memory from the system takes longer than the work
            self._row = np.empty(len(given), np.float64)
        row = self._row
        row[:] = given
        if options.logit_bias:
            add_bias(row, options.logit_bias)
        if options.repetition_penalty != 1.0:
            penalise_repetition(row, self._prompt | self._counts.keys(), options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            penalise_counts(row, self._counts, options.presence_penalty, options.frequency_penalty)
        return row

    def _filters(self) -> Iterator[Callable[[Row], Positions]]:
        options = self.options
        if options.top_k:
            yield partial(keep_top_k, k=options.top_k)
        if options.top_p < 1.0:
            yield partial(keep_top_p, p=options.top_p)
        if options.min_p > 0.0:
            yield partial(keep_min_p, p=options.min_p)


def _likeliest(row: NDArray[np.floating[Any]]) -> int:
    best = int(row.argmax())  # NaN, if there is one
    if not np.isfinite(row[best]):
        raise TorchchatError(f"the model returned {float(row[best])} as its highest logit",
                             "its weights are damaged, or its dtype overflows: try --dtype fp32 or bf16")
    return best


def numbers(logits: Tensor) -> NDArray[np.floating[Any]]:
    """Logits for numpy: the same memory, where it is the processor's and of a type that numpy has."""
    row = logits.detach().cpu()
    found: NDArray[np.floating[Any]] = (row if row.dtype in (torch.float32, torch.float64) else row.float()).numpy()
    return found


def add_bias(logits: Row, bias: Mapping[int, float]) -> None:
    """logits[t] + bias[t], in place. Raises `TorchchatError` for a token outside the vocabulary."""
    outside = [token for token in bias if token >= len(logits)]
    if outside:
        raise TorchchatError(f"logit_bias names token {outside[0]}; the vocabulary ends at {len(logits) - 1}")
    logits[list(bias)] += list(bias.values())


def penalise_repetition(logits: Row, seen: Collection[int], penalty: float) -> None:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones, in place.

    From CTRL, arXiv:1909.05858.
    """
    tokens = np.fromiter(seen, np.intp, len(seen))
    chosen = logits[tokens]
    logits[tokens] = np.where(chosen > 0, chosen / penalty, chosen * penalty)


def penalise_counts(logits: Row, counts: Mapping[int, int], presence: float, frequency: float) -> None:
    """logits[t] - presence * [count(t) > 0] - frequency * count(t), in place, as OpenAI's API defines it."""
    tokens = np.fromiter(counts, np.intp, len(counts))
    logits[tokens] -= presence + frequency * np.fromiter(counts.values(), np.float64, len(counts))


def keep_top_k(logits: Row, k: int) -> Positions:
    """Where the k largest are; of equal ones, the first."""
    near = _at_least_the_largest(logits, k)
    values = logits[near]
    if k >= len(values):
        return near
    least = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: k - len(above)]
    return near[np.sort(np.concatenate((above, equal)))]


def _at_least_the_largest(logits: Row, k: int) -> Positions:
    """Positions that the k largest are among and, of a large vocabulary, few others: quicker than sorting out all.

    As many as k blocks have a value that large, so that the k largest of all are no smaller.
    """
    blocks = len(logits) // BLOCK
    if k >= blocks:
        return np.arange(len(logits))
    highest_of_each = logits[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
    return np.flatnonzero(logits >= np.partition(highest_of_each, blocks - k)[blocks - k])


def keep_top_p(logits: Row, p: float) -> Positions:
    """The shortest run of likeliest tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751)."""
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    # Tokens below that come to half of what is beyond p, all together: they need not be sorted, which takes longest.
    likely = np.flatnonzero(chances > (1.0 - p) / (2 * len(chances)))
    order = likely[np.argsort(-logits[likely], kind="stable")]
    before = np.concatenate(([0.0], chances[order].cumsum()[:-1]))  # the likeliest token always stays
    return np.sort(order[before < p])


def keep_min_p(logits: Row, p: float) -> Positions:
    """Where tokens have at least p times the highest probability (Nguyen et al., arXiv:2407.01082)."""
    return np.flatnonzero(np.exp(logits - logits.max()) >= p)


def draw(weights: Row, uniform: float) -> int:
    """The first position at which the sum of weights passes `uniform`, in [0, 1), of the whole sum.

    The weights are overwritten.
    """
    sums = weights.cumsum(out=weights)
    passed = np.searchsorted(sums, uniform * sums[-1], side="right")
    return int(min(passed, np.searchsorted(sums, sums[-1])))  # that product may have been rounded up to the sum


def philox_uniform(seed: int, stream: int, step: int) -> float:
    """A random number in [0, 1) with 53 bits, from seed, stream and step alone.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) with the seed as key and
    (step, stream), two words each, as counter; the first two words of the result make the number.
    """
    word = 0xFFFFFFFF
    a, b, c, d = step & word, step >> 32 & word, stream & word, stream >> 32 & word
    key0, key1 = seed & word, seed >> 32 & word
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ key0, second & word, (first >> 32) ^ d ^ key1, first & word
        key0, key1 = (key0 + 0x9E3779B9) & word, (key1 + 0xBB67AE85) & word
    return ((b << 32 | a) >> 11) * 2.0**-53
