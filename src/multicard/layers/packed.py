"""Weights in the order in which the CPU's matrix kernel reads them.

Multiplying by one row is as fast as the weight can be read. In rows, as a checkpoint has it, MKL reads at half of what
memory gives; reordered once into oneDNN's blocks it reads at nearly all of it, in float32 and in bfloat16
(docs/llm.md has the figures). The reordered weight replaces the plain one: no memory is spent on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multicard.layers.head import ParallelLMHead
from multicard.layers.linear import ColumnParallelLinear, RowParallelLinear
from multicard.layers.shard import shard_of, sharded

DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether this torch has oneDNN and the operators that its own compiler uses to freeze linears."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(layer: nn.Module, keep_weight: bool = False) -> bool:
    """Make a linear layer or head on the CPU multiply with oneDNN; others are left as they are.

    Args:
        layer: its weight is reordered, so it can't be read afterwards.
        keep_weight: leave the weight in rows (it is also an embedding): still faster than MKL, by less.

    Returns:
        whether the weight was reordered, for which there were two of it for a moment.
    """
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | ParallelLMHead) or not available():
        return False
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype in DTYPES and not weight.is_mkldnn
    if not plain or not weight.numel():
        return False
    layer.multiply = _multiply
    if not keep_weight:
        shard = shard_of(weight)
        layer.weight = sharded(torch.ops.mkldnn._reorder_linear_weight(weight.detach()), shard)
    return not keep_weight


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
