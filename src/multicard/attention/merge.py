"""Merging partial outputs: attention over two sets of keys from attention over each, by their log-sum-exps.

With ``lse = log Σ exp(score)``, the whole output is the mean of the partial ones, weighted by ``exp(lse)`` (arXiv
2310.01889). It is computed in float32. A row that saw no key (LSE -inf) has no weight; a row that saw none in any part
gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multicard import collectives
from multicard.axis import Axis

WHOLE = slice(None)


class Accumulator:
    """The merged output of the query rows so far, in float32 once there is more than one part.

    Args:
        rows, heads: how many query rows and heads there are.
    """

    def __init__(self, rows: int, heads: int) -> None:
        self.rows, self.heads = rows, heads
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor, rows: slice = WHOLE, heads: slice = WHOLE) -> None:
        """Merge in ``out`` ``(B, rows, heads, Dv)`` and ``lse`` ``(B, rows, heads)``, for these rows and heads.

        A first part that covers everything is kept without a copy, and overwritten later.
        """
        if self._out is None and out.shape[1:3] == (self.rows, self.heads):
            self._out, self._lse = out, lse
            return
        whole_out, whole_lse = self._start(out)
        merge_(whole_out[:, rows, heads], whole_lse[:, rows, heads], out, lse)

    def _start(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            shape = (like.shape[0], self.rows, self.heads)
            self._out = like.new_zeros(*shape, like.shape[3], dtype=torch.float32)
            self._lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=like.device)
        elif self._out.dtype != torch.float32:
            self._out = self._out.float()
        return self._out, self._lse

    def result(self, like: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
        """``(out, lse)``: ``out`` ``(B, rows, heads, value_dim)`` in the dtype of ``like``; zeros without parts."""
        out, lse = self._start(like[..., :1].expand(*like.shape[:3], value_dim))
        return out.to(like.dtype), lse


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge a part into ``out`` and ``lse``, both float32, in place.

    The part's weight is ``exp(other) / (exp(lse) + exp(other)) = sigmoid(other - lse)``: one pass, no overflow.
    """
    weight = (other_lse - lse).sigmoid_().nan_to_num_(0.0)  # -inf - -inf: neither saw a key
    torch.logaddexp(lse, other_lse, out=lse)
    out.lerp_(other_out.to(out.dtype), weight.unsqueeze(-1))


def merge_all(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge parts that are stacked along dim 0, in order, so that every rank gets the same bits from the same parts.

    Args:
        outs: ``(parts, ..., Dv)`` float32. lses: ``(parts, ...)`` float32.
    """
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp_().nan_to_num_(0.0)
    return (outs * weights.unsqueeze(-1)).sum(0), lse


def merge_ranks(out: Tensor, lse: Tensor, axis: Axis) -> Tensor:
    """Merge every rank's part of the same rows, in rank order: the same bits on every rank. One all-gather.

    Args:
        out: ``(..., Dv)``. lse: ``(...)`` float32.

    Returns:
        ``(..., Dv)`` in float32, or ``out`` itself on one rank.
    """
    if axis.size == 1:
        return out
    parts = collectives.all_gather(torch.cat([out.float(), lse.unsqueeze(-1)], -1).unsqueeze(0), axis)
    return merge_all(parts[..., :-1], parts[..., -1])[0]
