"""Linear layers split over a tensor-parallel axis: by output (column) and by input (row).

The two compose without communication in between: ``row(activation(column(x)))`` needs one all-reduce
(Megatron-LM, arXiv 1909.08053). Names follow ``y = x Aᵀ + b`` with A split by its rows = output features
("column-parallel", from the paper's ``y = xA``) or by its columns = input features ("row-parallel").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import collectives
from multicard.axis import Axis
from multicard.errors import ConfigError
from multicard.layers.head import GatherLastDim
from multicard.layers.shard import Shard, Shares, Spans, check_partition, check_shares, count, cut, empty, shard_of

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x, weight, bias)`` to ``x Aᵀ + b``."""


class _ParallelLinear(nn.Module):
    """What both hold."""

    multiply: Multiply = staticmethod(F.linear)  # packing the weight changes it (multicard.layers.packed)
    in_features: int
    out_features: int
    axis: Axis
    spans: Spans
    weight: nn.Parameter
    bias: nn.Parameter | None

    def _fill(self, weight: Tensor, bias: Tensor | None) -> Self:
        """Take this rank's part of them."""
        self.weight = cut(weight, shard_of(self.weight))
        if self.bias is not None and bias is not None:
            self.bias = cut(bias, shard_of(self.bias))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, here={count(self.spans)}, "
            f"bias={self.bias is not None}, {self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """``y = x Aᵀ + b`` where each rank holds some of the output features and returns those.

    Fused projections (query-key-value, gate-up) are one layer that returns the concatenated outputs of the single ones;
    each rank's ``shares`` then have a span of each. Several ranks may hold the same row (replicated key/value heads).

    Args:
        in_features: length of the input's last dimension, whole on every rank.
        out_features: number of all output features.
        axis: the ranks that share them.
        bias: add one; each rank holds its own features' part.
        gather_output: return all output features on every rank (one all-gather) instead of this rank's.
        shares: every rank's spans of output features; None: an even split, with one more for the first ranks.
        parts: names and sizes, in the checkpoint, of the layers that this one fuses.

    Raises:
        ConfigError: shares that don't fit, or ``gather_output`` with features that no rank holds.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        bias: bool = True,
        gather_output: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        shares: Sequence[Sequence[range]] | None = None,
        parts: tuple[tuple[str, int], ...] = (),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.axis = in_features, out_features, axis
        self.shares: Shares = check_shares(shares, out_features, axis)
        self.spans = self.shares[axis.rank]
        self.weight = empty(Shard((out_features, in_features), 0, self.spans, parts), dtype, device)
        self.bias = empty(Shard((out_features,), 0, self.spans, parts), dtype, device) if bias else None
        self.gather = GatherLastDim(axis, shares=self.shares, size=out_features) if gather_output else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Sequence[nn.Linear],
        axis: Axis,
        gather_output: bool = False,
        shares: Sequence[Sequence[range]] | None = None,
    ) -> ColumnParallelLinear:
        """This rank's copy of its part of ``linear``, or of several on the same input, fused in that order."""
        linears = [linear] if isinstance(linear, nn.Linear) else list(linear)
        weight = torch.cat([m.weight for m in linears]) if len(linears) > 1 else linears[0].weight
        bias = _cat_biases(linears)
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, axis, bias is not None, gather_output, weight.dtype, "meta", shares=shares
        )
        return layer._fill(weight, bias)

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:  # named as nn.Linear's
        """``(..., in_features)`` to ``(..., this rank's features)``, or all of them with ``gather_output``.

        Args:
            added: ``(..., this rank's features)`` that are added to this rank's product (an adapter's).
        """
        y = _plus(self.multiply(input, self.weight, self.bias), added)
        return y if self.gather is None else self.gather(y)


class RowParallelLinear(_ParallelLinear):
    """``y = x Aᵀ + b`` where each rank holds some of the input features; their products are added up.

    One all-reduce. The bias is whole on every rank and added once, after the all-reduce.

    Args:
        in_features: number of all input features.
        out_features: output features, whole on every rank.
        axis: the ranks that share the input features.
        bias: add one.
        input_is_parallel: the input has only this rank's features (a column-parallel layer's output); False: it is
            whole, and this layer takes its own features.
        shares: every rank's spans of input features, each feature on exactly one rank; None: an even split.

    Raises:
        ConfigError: shares that aren't a partition of the input features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        bias: bool = True,
        input_is_parallel: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        shares: Sequence[Sequence[range]] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.axis = in_features, out_features, axis
        self.input_is_parallel = input_is_parallel
        self.shares: Shares = check_shares(shares, in_features, axis)
        check_partition(self.shares, in_features, "RowParallelLinear")
        self.spans = self.shares[axis.rank]
        self.weight = empty(Shard((out_features, in_features), 1, self.spans), dtype, device)
        self.bias = empty(Shard((out_features,), 0, (range(out_features),)), dtype, device) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        axis: Axis,
        input_is_parallel: bool = True,
        shares: Sequence[Sequence[range]] | None = None,
    ) -> RowParallelLinear:
        """This rank's copy of its part of ``linear``."""
        out_features, in_features = linear.weight.shape
        bias, dtype = linear.bias is not None, linear.weight.dtype
        layer = cls(in_features, out_features, axis, bias, input_is_parallel, dtype, "meta", shares=shares)
        return layer._fill(linear.weight, linear.bias)

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:  # named as nn.Linear's
        """``(..., this rank's features)``, or all of them, to ``(..., out_features)``, the same on every rank.

        Args:
            added: ``(..., out_features)`` that this rank adds to its product before the sum over ranks (an adapter's).
        """
        if self.axis.size == 1:
            return _plus(self.multiply(input, self.weight, self.bias), added)
        return self.finish(collectives.all_reduce(_plus(self.partial(input), added), self.axis))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's product ``(..., out_features)``, to be added to the other ranks'. No collective."""
        if not self.input_is_parallel:
            x = Shard(tuple(x.shape), x.dim() - 1, self.spans).take(x)
        return self.multiply(x, self.weight, None)

    def finish(self, total: Tensor) -> Tensor:
        """The output, from the sum of all ranks' products."""
        return total if self.bias is None else total + self.bias


def _plus(product: Tensor, added: Tensor | None) -> Tensor:
    """Their sum in the product's dtype; ``added`` may have a wider one."""
    return product if added is None else (product + added).to(product.dtype)


def _cat_biases(linears: Sequence[nn.Linear]) -> Tensor | None:
    biases: list[Tensor] = [m.bias for m in linears if m.bias is not None]
    if biases and len(biases) != len(linears):
        raise ConfigError("fusing linear layers with and without a bias: give all of them a bias, or none")
    return torch.cat(biases) if len(biases) > 1 else (biases[0] if biases else None)
