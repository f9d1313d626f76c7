"""Products with a weight in row order, as checkpoints have it, on the CPU.

For a single row the product is as fast as reading the weight, and library kernels read it at half to two thirds of
memory's speed (docs/llm.md). What :func:`one_row` says, Inductor compiles to code that reads it at nearly all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.backends.eager import HALF
from multicard.layers import packed

STREAMS = 4
MANY = 8  # rows, from which arithmetic limits a product rather than reading the weight
CHUNK = 1 << 18  # numbers of a weight that are widened at a time, so that they stay in the processor's cache


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` for a single row ``x``, ``(..., in_features)``; sums in float32. To be compiled.

    Four rows of the weight, a quarter of it apart, are read side by side: with one at a time additions wait for each
    other, and memory waits for them.
    """
    rows, columns = weight.shape
    row = x.reshape(columns).float()
    even = rows - rows % STREAMS
    streams = weight[:even].view(STREAMS, even // STREAMS, columns).float()
    sums = [(stream * row).sum(-1) for stream in streams.unbind(0)]
    rest = [(weight[even:].float() * row).sum(-1)] if even < rows else []
    y = torch.cat([*sums, *rest]).to(x.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], rows)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` by the library kernel that is fastest for so many rows on this processor."""
    if x.numel() < MANY * x.shape[-1]:
        return F.linear(x, weight, bias)
    if weight.dtype in packed.PACKED_TYPES and packed.available(weight.dtype):
        return packed.multiply(x, weight, bias)
    if weight.dtype not in HALF:
        return F.linear(x, weight, bias)
    wide, height = x.float(), max(1, CHUNK // weight.shape[1])  # MKL's product of half types takes seven times as long
    y = torch.cat([F.linear(wide, part.float()) for part in weight.split(height)], -1)
    return (y if bias is None else y + bias).to(x.dtype)
