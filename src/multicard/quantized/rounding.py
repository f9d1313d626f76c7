"""Rounding numbers to blocks: each block's scale is the least that reaches its largest number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.quantized.types import BLOCK_TYPES


def to_blocks(kind: str, numbers: Tensor) -> Tensor:
    """Float32 ``(rows, columns)`` as blocks, uint8 ``(rows, blocks, bytes)``; the last is filled with zeros.

    Q8_0: ``scale = max |x| / 127``. Q4_1: ``scale = (max x - min x) / 15``, from ``min x`` on. Scales and minima are
    rounded to float16 first, and then numbers to the nearest multiple.
    """
    columns = BLOCK_TYPES[kind].columns
    blocks = F.pad(numbers, (0, -numbers.shape[1] % columns)).unflatten(1, (-1, columns))
    return {"Q8_0": _q8_0, "Q4_1": _q4_1}[kind](blocks)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    codes = (blocks / _divisor(scale)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], -1)


def _q4_1(blocks: Tensor) -> Tensor:
    least = blocks.amin(-1, keepdim=True).half()
    scale = ((blocks.amax(-1, keepdim=True) - least.float()) / 15).half()
    codes = ((blocks - least.float()) / _divisor(scale)).round_().clamp_(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return torch.cat([scale.view(torch.uint8), least.view(torch.uint8), low | high << 4], -1)


def _divisor(scale: Tensor) -> Tensor:
    """Any number where the scale is 0, and so are all codes."""
    return torch.where(scale == 0, 1.0, scale.float())
