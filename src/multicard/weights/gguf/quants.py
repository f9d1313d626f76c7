"""Blocks of quantised numbers as torch tensors: an element is ``quants · scale + offset``, in float32.

The layouts are ggml's (``ggml-common.h``, ``ggml-quants.c``): d and m are float16 numbers of a block; sub-blocks of the
K types have 4- to 8-bit scales, which d multiplies. Every function takes ``(..., bytes)`` uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Unpacked(NamedTuple):
    """Blocks taken apart.

    Attributes:
        quants: ``(..., groups, size)`` int8 or uint8, in the order of the elements.
        scale: ``(..., groups, 1)`` float32, or ``(..., 1, 1)``.
        offset: of the same shape; None: 0.
    """

    quants: Tensor
    scale: Tensor
    offset: Tensor | None = None


def dequantize(name: str, blocks: Tensor) -> Tensor:
    """``(..., blocks, bytes)`` uint8 of the type ``name`` to ``(..., elements)`` float32."""
    quants, scale, offset = UNPACK[name](blocks)
    found = quants.float().mul_(scale)
    if offset is not None:
        found.add_(offset)
    return found.flatten(-3)


def _q8_0(raw: Tensor) -> Unpacked:
    """d, 32 int8."""
    return Unpacked(_int8(raw[..., 2:]).unsqueeze(-2), _half(raw, 0))


def _q4_0(raw: Tensor) -> Unpacked:
    """d, 32 × 4 bits, less 8."""
    return Unpacked(_int8(_bits(raw[..., 2:18], 16, (0, 4), 15)) - 8, _half(raw, 0))


def _q4_1(raw: Tensor) -> Unpacked:
    """d, m, 32 × 4 bits."""
    return Unpacked(_bits(raw[..., 4:20], 16, (0, 4), 15), _half(raw, 0), _half(raw, 2))


def _q5_0(raw: Tensor) -> Unpacked:
    """d, 32 fifth bits, 32 × 4 bits, less 16."""
    return Unpacked(_int8(_bits(raw[..., 6:22], 16, (0, 4), 15) | _fifth(raw[..., 2:6])) - 16, _half(raw, 0))


def _q5_1(raw: Tensor) -> Unpacked:
    """d, m, 32 fifth bits, 32 × 4 bits."""
    return Unpacked(_bits(raw[..., 8:24], 16, (0, 4), 15) | _fifth(raw[..., 4:8]), _half(raw, 0), _half(raw, 2))


def _q2_k(raw: Tensor) -> Unpacked:
    """16 × (4 bits of scale, 4 of minimum), 256 × 2 bits, d, dmin. Groups of 16."""
    scales = raw[..., :16].unsqueeze(-1)
    quants = _bits(raw[..., 16:80], 32, (0, 2, 4, 6), 3).unflatten(-1, (2, 16)).flatten(-3, -2)
    return Unpacked(quants, _half(raw, 80) * (scales & 15), -(_half(raw, 82) * (scales >> 4)))


def _q3_k(raw: Tensor) -> Unpacked:
    """256 third bits, 256 × 2 bits, 16 × 6 bits of scale less 32, d. An element without its third bit is 4 less."""
    third = _bits(raw[..., :32], 32, tuple(range(8)), 1)
    quants = _int8(_bits(raw[..., 32:96], 32, (0, 2, 4, 6), 3) | third << 2) - 4
    low, high = _bits(raw[..., 96:104], 8, (0, 4), 15), _bits(raw[..., 104:108], 4, (0, 2, 4, 6), 3)
    scales = _int8(low.flatten(-2) | high.flatten(-2) << 4) - 32
    return Unpacked(quants.unflatten(-1, (2, 16)).flatten(-3, -2), _half(raw, 108) * scales.unsqueeze(-1))


def _q4_k(raw: Tensor) -> Unpacked:
    """d, dmin, 8 × (6 bits of scale, 6 of minimum), 256 × 4 bits. Groups of 32."""
    return Unpacked(_bits(raw[..., 16:144], 32, (0, 4), 15), *_scales_and_minima(raw))


def _q5_k(raw: Tensor) -> Unpacked:
    """d, dmin, 8 × (6 bits of scale, 6 of minimum), 256 fifth bits, 256 × 4 bits. Groups of 32."""
    fifth = _bits(raw[..., 16:48], 32, tuple(range(8)), 1)
    return Unpacked(_bits(raw[..., 48:176], 32, (0, 4), 15) | fifth << 4, *_scales_and_minima(raw))


def _q6_k(raw: Tensor) -> Unpacked:
    """256 × low 4 bits, 256 × high 2 bits, 16 int8 scales, d; elements are 32 less. Groups of 16."""
    low = _bits(raw[..., :128], 64, (0, 4), 15).unflatten(-1, (2, 32)).flatten(-3, -2)
    high = _bits(raw[..., 128:192], 32, (0, 2, 4, 6), 3)
    quants = (_int8(low | high << 4) - 32).unflatten(-1, (2, 16)).flatten(-3, -2)
    return Unpacked(quants, _half(raw, 208) * _int8(raw[..., 192:208]).unsqueeze(-1))


def _scales_and_minima(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: the low 6 bits of bytes 0 to 7 are four scales and four minima; the other four of each have
    their low 4 bits in bytes 8 to 11, and their high 2 bits at the top of bytes 0 to 7."""
    first, second, last = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = torch.cat([first & 63, (last & 15) | (first >> 6 << 4)], -1).unsqueeze(-1)
    minima = torch.cat([second & 63, (last >> 4) | (second >> 6 << 4)], -1).unsqueeze(-1)
    return _half(raw, 0) * scales, -(_half(raw, 2) * minima)


def _bits(raw: Tensor, run: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Numbers of a few bits: of every ``run`` bytes first those at ``shifts[0]``, then those at ``shifts[1]``, ...

    ``(..., bytes)`` to ``(..., groups, run)`` uint8.
    """
    by = torch.tensor(shifts, dtype=torch.uint8, device=raw.device)[:, None]
    return (raw.unflatten(-1, (-1, 1, run)) >> by & mask).flatten(-3, -2)


def _fifth(raw: Tensor) -> Tensor:
    """The fifth bits of 32 elements, lowest first, at their place: ``(..., 4)`` to ``(..., 2, 16)`` uint8."""
    by = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return ((raw.unsqueeze(-1) >> by & 1) << 4).flatten(-2).unflatten(-1, (2, 16))


def _half(raw: Tensor, at: int) -> Tensor:
    """The float16 number at byte ``at``: ``(..., 1, 1)`` float32."""
    return raw[..., at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float().unsqueeze(-1)


def _int8(raw: Tensor) -> Tensor:
    return raw.view(torch.int8)


UNPACK: dict[str, Callable[[Tensor], Unpacked]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
