"""Rotary positions (arXiv 2104.09864) as Hugging Face lays them out: pairs are (i, i + head_dim/2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multicard.models.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of every pair, ``(head_dim/2,)`` float32."""
    base = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if config.divisors:
        base = base / torch.tensor(config.divisors)
    if config.kind == "linear":
        return base / config.factor
    if config.kind != "llama3":
        return base
    # Llama 3.1's: wavelengths past original_context/low_freq_factor are divided, those under .../high_freq_factor kept.
    turns = config.original_context * base / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    kept = ((turns - config.low_freq_factor) / span).clamp(0, 1)
    return base * kept + base / config.factor * (1 - kept)


class Rope:
    """A table of cosines and sines for positions, which grows as needed."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = frequencies(config, head_dim).to(device)
        self._dtype = dtype
        self._table = torch.empty(0, 2, head_dim, dtype=dtype, device=device)

    def __call__(self, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Cos and sin, ``(batch or 1, tokens, 1, head_dim)``, of ``(batch or 1, tokens)`` positions under ``limit``.

        The first half of the sine is negated, as the rotation needs it.
        """
        if limit > len(self._table):
            self._grow(limit)
        cos, sin = self._table[positions].unbind(2)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _grow(self, limit: int) -> None:
        length = 1 << (limit - 1).bit_length()
        angles = torch.arange(length, device=self._frequencies.device).float()[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)
        self._table = table.to(self._dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(batch, tokens, heads, head_dim)`` rotated by :class:`Rope`'s cos and sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
