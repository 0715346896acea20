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

    A sequence that may grow beyond `original_context` wants `extended=True` with longrope: its frequencies differ.
    The choice is made once for a sequence, by the length that it may reach, so that all its keys agree.
    """

    short: Tensor  # [head_dim / 2], radians per position, float32
    long: Tensor  # the same beyond the original context; equal to short for all kinds but longrope

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        scaling = config.rope_scaling
        self.interleaved = config.rope_interleaved
        self.amplitude = rotary_amplitude(scaling)
        self.original_context = scaling.original_context if scaling and scaling.kind == "longrope" else None
        self.register_buffer("short", rotary_frequencies(config, extended=False), persistent=False)
        self.register_buffer("long", rotary_frequencies(config, extended=True), persistent=False)

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """Moves with the module to another device, but stays float32: half an angle would be another position."""
        short, long = self.short, self.long
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self.short, self.long = short.to(self.short.device), long.to(self.long.device)
        return self

    def extends(self, length: int) -> bool:
        """Whether a sequence that may reach `length` positions takes the frequencies for long ones."""
        return self.original_context is not None and length > self.original_context

    def forward(self, positions: Tensor, extended: bool = False) -> tuple[Tensor, Tensor]:
        """positions [n] -> cos, signed sin, each [n, 1, head_dim] float32."""
        frequencies = self.long if extended else self.short
        angles = positions.float()[:, None] * frequencies  # [n, head_dim / 2]
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos[:, None], sin[:, None]


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
    if scaling is None:
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
