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

STREAMS = {1: 4}
"""Rows of the weight that are read side by side, by the number of rows; for others FEW_STREAMS."""
FEW_STREAMS = 2  # of more, a processor with 16 vector registers would keep some sums in memory
SOME, MANY = 4, 128
"""Rows: from SOME on half types are better widened; from MANY on a product takes its time for arithmetic."""
CHUNK = 1 << 18  # numbers of a weight that are widened at a time, so that they stay in the processor's cache


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` for a few rows ``x``, ``(..., in_features)``; sums in float32. To be compiled.

    Some rows of the weight, far from each other, are read side by side: with one at a time additions wait for each
    other, and memory waits for them. Each number that was read is used for all rows of ``x``.
    """
    rows, columns = weight.shape
    vectors = x.reshape(-1, columns).float().unbind(0)
    streams = STREAMS.get(len(vectors), FEW_STREAMS)
    even = rows - rows % streams
    parts = [*weight[:even].view(streams, -1, columns).unbind(0)] if even else []
    parts += [weight[even:]] if even < rows else []
    # A half type is widened in each product: widened once, Inductor would write the float32 weight to memory.
    y = torch.stack([torch.cat([(part * vector).sum(-1) for part in parts]) for vector in vectors]).to(x.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], rows)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` by the library kernel that is fastest for so many rows on this processor."""
    rows = x.numel() // x.shape[-1]
    native = weight.dtype in packed.PACKED_TYPES and packed.available(weight.dtype)
    if weight.dtype in HALF and not native and rows >= SOME:
        return _widened(x, weight, bias)
    if weight.dtype == torch.float32 and 1 < rows < MANY:
        # MKL reads a weight on the left twice as fast as one on the right
        y = (weight @ x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return packed.multiply(x, weight, bias) if native and rows >= SOME else F.linear(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product of half types in float32: without instructions for them MKL's own takes up to seven times as long."""
    wide, height = x.float(), max(1, CHUNK // weight.shape[1])
    y = torch.cat([F.linear(wide, part.float()) for part in weight.split(height)], -1)
    return (y if bias is None else y + bias).to(x.dtype)
