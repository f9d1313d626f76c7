"""Products with a weight in row order, as checkpoints have it, on the CPU.

For a few rows the product is as fast as reading the weight, and library kernels read it at half to two thirds of
memory's speed (docs/llm.md). What :func:`few_rows` says, Inductor compiles to code that reads it at nearly all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.backends.eager import HALF
from multicard.layers import packed

ALONE, TOGETHER = 4, 2
"""Rows of the weight that are read side by side for one row and for several: of more, sums would leave registers."""
SOME, FEW, MANY = 4, 8, 128
"""Rows from which on half types are better widened (SOME), or reordered where the processor has instructions for them
(FEW); from MANY on a product of float32 takes its time for arithmetic."""
CHUNK = 1 << 18  # numbers of a weight that are widened at a time, so that they stay in the processor's cache


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` for a few rows ``x``, ``(..., in_features)``; sums in float32. To be compiled.

    Some rows of the weight, far from each other, are read side by side: with one at a time additions wait for each
    other, and memory waits for them. Each number that was read is used for all rows of ``x``.
    """
    rows, columns = weight.shape
    vectors = x.reshape(-1, columns).float().unbind(0)
    streams = ALONE if len(vectors) == 1 else TOGETHER
    even = rows - rows % streams
    parts = [*weight[:even].view(streams, -1, columns).unbind(0)] if even else []
    parts += [weight[even:]] if even < rows else []
    # A half type is widened in each product: widened once, Inductor would write the float32 weight to memory.
    y = torch.stack([torch.cat([(part * vector).sum(-1) for part in parts]) for vector in vectors]).to(x.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], rows)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` by the library kernel that is fastest for so many rows on this processor."""
    rows = x.numel() // x.shape[-1]
    if rows == 1:
        return F.linear(x, weight, bias)
    if weight.dtype == torch.float32 and rows < MANY:
        # MKL reads a weight on the left twice as fast as one on the right
        y = (weight @ x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    if weight.dtype in packed.PACKED_TYPES and packed.available(weight.dtype):
        return packed.multiply(x, weight, bias) if rows >= FEW else F.linear(x, weight, bias)
    widens = weight.dtype in HALF and rows >= SOME
    return _widened(x, weight, bias) if widens else F.linear(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product of half types in float32: without instructions for them MKL's own takes up to seven times as long."""
    wide, height = x.float(), max(1, CHUNK // weight.shape[1])
    y = torch.cat([F.linear(wide, part.float()) for part in weight.split(height)], -1)
    return (y if bias is None else y + bias).to(x.dtype)
