"""Choosing the next token from logits: small pure functions, composed in one order for every runtime.

logits -> bias -> repetition, presence and frequency penalty -> temperature -> top-k -> top-p -> min-p -> draw

Temperature 0 takes the largest logit after bias and penalties; of equal ones, the lowest id. A draw walks the
remaining tokens by rising id with one random number from `philox_uniform`, so that the same logits and the same
seed give the same token on every machine. docs/sampling.md specifies it for other implementations.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.generation_options import SamplingOptions


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
        token = self._pick(self._processed(logits.to(torch.float64)))
        self._counts[token] = self._counts.get(token, 0) + 1
        self._step += 1
        return token

    def _processed(self, logits: Tensor) -> Tensor:
        options = self.options
        if options.logit_bias:
            logits = add_bias(logits, options.logit_bias)
        if options.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, self._prompt | self._counts.keys(), options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            logits = penalise_counts(logits, self._counts, options.presence_penalty, options.frequency_penalty)
        return logits

    def _pick(self, logits: Tensor) -> int:
        options = self.options
        best = highest(logits)
        if not torch.isfinite(logits[best]):
            raise TorchchatError(f"the model returned {float(logits[best])} as its highest logit",
                                 "its weights are damaged, or its dtype overflows: try --dtype fp32 or bf16")
        if options.temperature == 0.0:
            return best
        kept = (logits - logits[best]) / options.temperature  # the difference, which no temperature can overflow
        if options.top_k:
            kept = keep_top_k(kept, options.top_k)
        if options.top_p < 1.0:
            kept = keep_top_p(kept, options.top_p)
        if options.min_p > 0.0:
            kept = keep_min_p(kept, options.min_p)
        return draw(kept, philox_uniform(self.seed, self._stream, self._step))


def highest(logits: Tensor) -> int:
    """The first of the highest logits [vocab]; of NaN too, if there is one.

    A row is too short for several threads, and PyTorch's would still wait for work when the next token is computed.
    """
    plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    return int(logits.numpy().argmax() if plain else logits.argmax())


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """logits[t] + bias[t]. Raises `TorchchatError` for a token outside the vocabulary."""
    outside = [token for token in bias if token >= logits.shape[0]]
    if outside:
        raise TorchchatError(f"logit_bias names token {outside[0]}; the vocabulary ends at {logits.shape[0] - 1}")
    logits = logits.clone()
    logits[list(bias.keys())] += torch.tensor(list(bias.values()), dtype=logits.dtype)
    return logits


def penalise_repetition(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones (CTRL, arXiv:1909.05858)."""
    if not seen:
        return logits
    tokens = torch.tensor(sorted(seen))
    chosen = logits[tokens]
    return logits.index_put((tokens,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def penalise_counts(logits: Tensor, counts: Mapping[int, int], presence: float, frequency: float) -> Tensor:
    """logits[t] - presence * [count(t) > 0] - frequency * count(t), as OpenAI's API defines it."""
    if not counts:
        return logits
    tokens = torch.tensor(list(counts.keys()))
    times = torch.tensor(list(counts.values()), dtype=logits.dtype)
    return logits.index_put((tokens,), logits[tokens] - presence - frequency * times)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits become -inf; of equal ones, lower ids stay."""
    if k >= logits.shape[0]:
        return logits
    least = torch.topk(logits, k).values[-1]
    above = logits > least
    equal = (logits == least).nonzero()[:, 0][: k - int(above.sum())]
    above[equal] = True
    return logits.masked_fill(~above, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the shortest run of likeliest tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751)."""
    ordered, ids = logits.sort(descending=True, stable=True)
    before = ordered.softmax(0).cumsum(0).roll(1)
    before[0] = 0.0  # the likeliest token always stays
    return logits.index_fill(0, ids[before >= p], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens with at least p times the highest probability (Nguyen et al., arXiv:2407.01082)."""
    return logits.masked_fill((logits - logits.max()).exp() < p, -torch.inf)


def draw(logits: Tensor, uniform: float) -> int:
    """The first token, by rising id, at which the sum of probabilities passes `uniform` in [0, 1)."""
    cumulative = (logits - logits.max()).exp().cumsum(0)
    target = uniform * float(cumulative[-1])
    token = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=cumulative.dtype), right=True))
    if token < logits.shape[0]:
        return token
    return int((logits > -torch.inf).nonzero()[-1])  # uniform * sum was rounded up to the sum


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
