"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways in use to stretch it."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchchat_core.errors import TorchchatError
from torchchat_core.models.config import ModelConfig, RopeScaling


class RotaryEmbedding(nn.Module):
    """Angles for positions, in a layout that `apply_rotary` multiplies in.

    Two kinds of scaling use different frequencies beyond the original context. With longrope, the maximum length of a
    sequence selects them once, so that all its keys agree. With dynamic NTK scaling, the frequencies depend on the
    length of the sequence at each step, as in transformers. `extension` selects the frequencies.
    """

    short: Tensor  # [head_dim / 2], radians per position, float32
    long: Tensor  # the same beyond the original context; equal to short for all kinds but longrope

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        scaling = config.rope_scaling
        self.interleaved = config.rope_interleaved
        self.amplitude = rotary_amplitude(scaling)
        self.original_context = scaling.original_context if scaling and scaling.kind == "longrope" else None
        self.dynamic = DynamicFrequencies(config, scaling) if scaling and scaling.kind == "dynamic" else None
        self.register_buffer("short", rotary_frequencies(config, extended=False), persistent=False)
        self.register_buffer("long", rotary_frequencies(config, extended=True), persistent=False)

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """Moves with the module to another device, but stays float32: half an angle would be another position."""
        short, long = self.short, self.long
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self.short, self.long = short.to(self.short.device), long.to(self.long.device)
        return self

    def extends(self, length: int) -> bool:
        """Return True if a sequence that may reach `length` positions uses the frequencies for long sequences.

        For runtimes whose frequencies do not change while a sequence grows. Raises `TorchchatError` if the model's do.
        """
        if self.dynamic is not None and length > self.dynamic.original_context:
            context = self.dynamic.original_context
            raise beyond_dynamic(context, "this runtime does not support",
                                 f"--executor eager, or --max-seq-length {context}")
        return self.original_context is not None and length > self.original_context

    def extension(self, limit: int, length: int) -> int:
        """Return the argument `extended` of `forward` for a step after which a sequence has `length` positions.

        `limit` is the length that the sequence may reach. 0 selects the frequencies of the original context.
        """
        if self.dynamic is not None:
            return length if length > self.dynamic.original_context else 0
        return int(self.extends(limit))

    def forward(self, positions: Tensor, extended: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """positions [n] -> cos, signed sin, each [n, 1, head_dim] float32.

        `extended` comes from `extension`. With dynamic scaling it may be int64 [n], one length for each position.
        """
        if self.dynamic is not None and not (isinstance(extended, int) and extended == 0):
            frequencies = self.dynamic(torch.as_tensor(extended, device=positions.device))
        else:
            frequencies = self.long if extended else self.short
        angles = positions.float()[:, None] * frequencies  # [n, head_dim / 2]
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos[:, None], sin[:, None]


class DynamicFrequencies:
    """Dynamic NTK scaling: beyond the original context, the base grows with the length of the sequence.

    The formula comes from transformers (modeling_rope_utils.py, `_compute_dynamic_ntk_parameters`).
    """

    def __init__(self, config: ModelConfig, scaling: RopeScaling) -> None:
        self.original_context = scaling.original_context or config.max_context
        self._theta, self._factor, self._head_dim = config.rope_theta, scaling.factor, config.head_dim

    def __call__(self, lengths: Tensor) -> Tensor:
        """sequence lengths [] or [n] -> radians per position, float32 [head_dim / 2] or [n, head_dim / 2]."""
        ratio = lengths.double().clamp(min=self.original_context) / self.original_context
        grown = (self._factor * ratio - (self._factor - 1)) ** (self._head_dim / (self._head_dim - 2))
        exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=lengths.device) / self._head_dim
        frequencies: Tensor = 1.0 / (self._theta * grown).float()[..., None] ** exponents
        return frequencies


def beyond_dynamic(original_context: int, what: str, fix: str) -> TorchchatError:
    """Return the error for a runtime whose frequencies cannot change with the length of the sequence."""
    return TorchchatError(f"the model's rope scaling 'dynamic' changes its frequencies beyond {original_context} "
                          f"positions, which {what}", fix)


def apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor, interleaved: bool) -> Tensor:
    """Turns each pair of dimensions of x [n, heads, head_dim] by its angle, in float32; the result has x's dtype."""
    wide = x.to(cos.dtype)
    if interleaved:
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = wide.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(wide * cos, partner, signed_sin).to(x.dtype)


def rotary_frequencies(config: ModelConfig, extended: bool) -> Tensor:
    """Radians per position for each pair of dimensions, [head_dim / 2] float32 on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies: Tensor = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, config)
    factors = scaling.long_factor if extended else scaling.short_factor
    if len(factors) != len(frequencies):
        raise TorchchatError(f"rope_scaling has {len(factors)} longrope factors; head_dim {config.head_dim} needs "
                             f"{len(frequencies)}")
    return frequencies / torch.tensor(factors, dtype=torch.float32, device="cpu")


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended (Llama 3.1)."""
    context = float(scaling.original_context or 8192)
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """NTK-by-parts interpolation of YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2)."""
    context = float(scaling.original_context or config.max_context)

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns so many times within the original context."""
        return config.head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    index = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    interpolated = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * ((1 - interpolated) + interpolated / scaling.factor)


def rotary_amplitude(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by: the attention temperature of YaRN and of LongRoPE, else 1."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context or math.e))
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
