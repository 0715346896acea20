"""The two orders in which rotary position embedding finds its pairs, and how weights go from one to the other.

Hugging Face's files are half-split: dimensions i and i + head_dim/2 of a head are a pair. Meta's files, llama2.c's,
torchtune's Llama and GGUF's `llama` are interleaved: dimensions 2i and 2i + 1 are one. The order is that of the
outputs of the query and key projections, so that only the rows of these weights differ.
"""

from __future__ import annotations

from torch import Tensor

from torchchat_core.errors import TorchchatError


def interleaved_rows(weight: Tensor, heads: int) -> Tensor:
    """From Hugging Face's half-split order to Meta's interleaved one: [heads * head_dim, ...], the same shape.

    `weight` is that of a query or key projection, its bias (1-D), or a norm over head_dim with `heads` 1.
    The inverse of `half_split_rows`. Raises `TorchchatError` where the rows are not `heads` heads of even size.
    """
    return _swapped(weight, heads, (2, _half(weight, heads)))


def half_split_rows(weight: Tensor, heads: int) -> Tensor:
    """From Meta's interleaved order to Hugging Face's half-split one: [heads * head_dim, ...], the same shape.

    The inverse of `interleaved_rows`, with the same arguments and errors.
    """
    return _swapped(weight, heads, (_half(weight, heads), 2))


def _half(weight: Tensor, heads: int) -> int:
    rows = weight.shape[0] if weight.dim() else 0
    if heads < 1 or not rows or rows % (2 * heads):
        raise TorchchatError(f"a weight of the shape {list(weight.shape)} is not that of {heads} attention heads of an "
                             "even size")
    return rows // heads // 2


def _swapped(weight: Tensor, heads: int, pair: tuple[int, int]) -> Tensor:
    swapped: Tensor = weight.unflatten(0, (heads, *pair)).transpose(1, 2).flatten(0, 2)
    return swapped.contiguous()
