"""Root-mean-square normalisation (arXiv 1910.07467), whole or with its features split over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import collectives
from multicard.axis import Axis
from multicard.layers.shard import Shard, check_partition, check_shares, cut


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, whole on every rank. No collective."""

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps = (size,), eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., size)`` to the same."""
        return F.rms_norm(x, self.size, self.weight, self.eps)


class ParallelRMSNorm(nn.Module):
    """The same with some of the features on each rank (a norm over all heads of a split projection).

    One all-reduce of a sum of squares in float32 a row.

    Args:
        size: number of all features.
        axis: the ranks that share them.
        weight: the whole weight, or None for none.
        shares: every rank's spans, each feature on exactly one rank; None: an even split.
    """

    def __init__(
        self,
        size: int,
        axis: Axis,
        eps: float = 1e-6,
        weight: Tensor | None = None,
        shares: Sequence[Sequence[range]] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.axis, self.eps = size, axis, eps
        checked = check_shares(shares, size, axis)
        check_partition(checked, size, "ParallelRMSNorm")
        self.weight = None if weight is None else cut(weight, Shard((size,), 0, checked[axis.rank]))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., this rank's features)`` to the same."""
        wide = x.float()
        squares = collectives.all_reduce(wide.square().sum(-1, keepdim=True), self.axis)
        y = wide * torch.rsqrt(squares / self.size + self.eps)
        return y.to(x.dtype) if self.weight is None else y.to(x.dtype) * self.weight
