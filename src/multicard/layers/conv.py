"""2-D convolutions split over a tensor-parallel axis by channels: by output (column) and by input (row).

As with linear layers, ``row(activation(column(x)))`` needs one all-reduce. Grouped convolutions are split by whole
groups, because a group's outputs depend only on its own inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import collectives, partition
from multicard.axis import Axis
from multicard.errors import ConfigError
from multicard.layers.shard import Shard, shard_of, sharded


class _ParallelConv2d(nn.Module):
    """The common base: the settings of the whole convolution, and this rank's part of its parameters."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, *shape: Any, axis: Axis, device: torch.device | str | None = None, **options: Any) -> None:
        with torch.device("meta"):
            whole = nn.Conv2d(*shape, **options)
        self._hold(whole, axis)
        for name, parameter in list(self.named_parameters()):  # memory for them; the shard rules stay
            data = torch.empty_like(parameter, device=device or torch.get_default_device())
            setattr(self, name, sharded(data, shard_of(parameter)))

    def _hold(self, conv: nn.Conv2d, axis: Axis) -> None:
        """Copy this rank's part of ``conv``."""
        nn.Module.__init__(self)
        if type(conv) is not nn.Conv2d:
            raise ConfigError(
                f"{type(conv).__name__} isn't torch.nn.Conv2d: parallel convolutions support no other class"
            )
        self.axis = axis
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation, self.padding_mode = conv.padding, conv.dilation, conv.padding_mode
        # reflect, replicate and circular padding, applied before, with torch.nn.Conv2d's own amounts for F.pad
        self._pad = None if conv.padding_mode == "zeros" else list(conv._reversed_padding_repeated_twice)
        weight, bias = self._shards(conv)
        self.weight = sharded(weight.take(conv.weight.detach()), weight)
        self.bias = None if conv.bias is None else sharded(bias.take(conv.bias.detach()), bias)

    def _shards(self, conv: nn.Conv2d) -> tuple[Shard, Shard]:
        """The rules of the weight and of the bias."""
        raise NotImplementedError

    def _spans(self, rank: int) -> tuple[range, range]:
        """The whole groups of a rank, as input and as output channels."""
        mine = partition.split(self.groups, self.axis.size)[rank]
        ins, outs = self.in_channels // self.groups, self.out_channels // self.groups
        return range(mine.start * ins, mine.stop * ins), range(mine.start * outs, mine.stop * outs)

    def _convolve(self, x: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        weight, padding = self.weight, self.padding
        if self._pad is not None:
            x = F.pad(x, self._pad, mode=self.padding_mode) if x.shape[1] else _grow(x, self._pad)
            padding = (0, 0)
        if weight.numel():
            return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)
        # no channels on this rank: only the output's shape is needed, from meta tensors
        one = torch.empty(1, 1, *self.kernel_size, dtype=x.dtype, device="meta")
        like = x.new_empty(x.shape[0], 1, *x.shape[2:], device="meta")
        size = F.conv2d(like, one, None, self.stride, padding, self.dilation).shape[2:]
        out = x.new_zeros(x.shape[0], weight.shape[0], *size)
        return out if bias is None else out + bias[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, here={tuple(self.weight.shape[:2])}, "
            f"{self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


class ColumnParallelConv2d(_ParallelConv2d):
    """A convolution in which each rank computes some of the output channels, in order; the first ranks one more.

    Args:
        shape, options: as for ``torch.nn.Conv2d``, of the whole convolution; only whole groups are split. The input is
            whole on every rank; each rank holds the bias of its own channels.
        axis: the ranks that share the output channels.
        gather_output: return all channels on every rank (one all-gather) instead of this rank's.
    """

    def __init__(self, *shape: Any, axis: Axis, gather_output: bool = False, **options: Any) -> None:
        super().__init__(*shape, axis=axis, **options)
        self.gather_output = gather_output

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, axis: Axis, gather_output: bool = False) -> ColumnParallelConv2d:
        """This rank's copy of its part of ``conv``."""
        layer = cls.__new__(cls)
        layer._hold(conv, axis)
        layer.gather_output = gather_output
        return layer

    def _shards(self, conv: nn.Conv2d) -> tuple[Shard, Shard]:
        mine = _spans_of(self.share(self.axis.rank))
        return Shard(tuple(conv.weight.shape), 0, mine), Shard((conv.out_channels,), 0, mine)

    def share(self, rank: int) -> range:
        """The output channels of ``rank``."""
        if self.groups > 1:
            return self._spans(rank)[1]
        return partition.split(self.out_channels, self.axis.size)[rank]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, this rank's channels, H', W')``, or all with ``gather_output``.

        N may be left out, as in torch.nn.Conv2d.
        """
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        groups = 1
        if self.groups > 1:
            mine = self._spans(self.axis.rank)[0]
            x, groups = x[:, mine.start : mine.stop], len(partition.split(self.groups, self.axis.size)[self.axis.rank])
        y = self._convolve(x, self.bias, groups)
        if not self.gather_output:
            return y
        return collectives.all_gather(y, self.axis, 1, [len(self.share(rank)) for rank in range(self.axis.size)])


class RowParallelConv2d(_ParallelConv2d):
    """A convolution in which each rank holds some of the input channels; the products are summed over ranks.

    One all-reduce. The bias is whole on every rank and added once, after the all-reduce.

    Args:
        shape, options: as for ``torch.nn.Conv2d``, of the whole convolution; only whole groups are split.
        axis: the ranks that share the input channels.
        input_is_parallel: the input has only this rank's channels (a column-parallel convolution's output); False: it
            is whole, and this layer takes its own channels.
    """

    def __init__(self, *shape: Any, axis: Axis, input_is_parallel: bool = True, **options: Any) -> None:
        super().__init__(*shape, axis=axis, **options)
        self.input_is_parallel = input_is_parallel

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, axis: Axis, input_is_parallel: bool = True) -> RowParallelConv2d:
        """This rank's copy of its part of ``conv``."""
        layer = cls.__new__(cls)
        layer._hold(conv, axis)
        layer.input_is_parallel = input_is_parallel
        return layer

    def _shards(self, conv: nn.Conv2d) -> tuple[Shard, Shard]:
        if self.groups > 1:  # the weight's rows are output channels, each over its own group's inputs
            weight = Shard(tuple(conv.weight.shape), 0, _spans_of(self._spans(self.axis.rank)[1]))
        else:
            weight = Shard(tuple(conv.weight.shape), 1, _spans_of(self.share(self.axis.rank)))
        return weight, Shard((conv.out_channels,), 0, (range(conv.out_channels),))

    def share(self, rank: int) -> range:
        """The input channels of ``rank``."""
        if self.groups > 1:
            return self._spans(rank)[0]
        return partition.split(self.in_channels, self.axis.size)[rank]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, this rank's channels, H, W)``, or all of them, to ``(N, out_channels, H', W')`` on every rank.

        N may be left out, as in torch.nn.Conv2d.
        """
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if self.axis.size == 1:
            return self._convolve(x, self.bias, self.groups)
        if not self.input_is_parallel:
            mine = self.share(self.axis.rank)
            x = x[:, mine.start : mine.stop]
        y = self._own_groups(x) if self.groups > 1 else collectives.all_reduce(self._convolve(x, None, 1), self.axis)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _own_groups(self, x: Tensor) -> Tensor:
        """Each group's outputs are on one rank, so they are gathered instead of summed."""
        y = self._convolve(x, None, len(partition.split(self.groups, self.axis.size)[self.axis.rank]))
        return collectives.all_gather(y, self.axis, 1, [len(self._spans(rank)[1]) for rank in range(self.axis.size)])


def _spans_of(share: range) -> tuple[range, ...]:
    return (share,) if share else ()


def _grow(x: Tensor, pad: list[int]) -> Tensor:
    """An input with no channels, padded: ``F.pad`` takes no empty input in modes other than zeros."""
    return x.new_empty(*x.shape[:2], x.shape[2] + pad[2] + pad[3], x.shape[3] + pad[0] + pad[1])
