"""2-D and 3-D convolutions split over a tensor-parallel axis by channels: by output (column) and by input (row).

As with linear layers, ``row(activation(column(x)))`` needs one all-reduce. Grouped convolutions are split by whole
groups, because a group's outputs depend only on its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import collectives, partition
from multicard.axis import Axis
from multicard.errors import ConfigError
from multicard.layers.shard import Shard, cut, empty, shard_of


class _ParallelConv(nn.Module):
    """The common base: the settings of the whole convolution, and this rank's part of its parameters.

    Attributes:
        kind: torch's class of the whole convolution.
        function: torch's function for it.
    """

    kind: ClassVar[type[nn.Conv2d] | type[nn.Conv3d]]
    function: ClassVar[Callable[..., Tensor]]
    by_input: ClassVar[bool]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, *shape: Any, axis: Axis, device: torch.device | str | None = None, **options: Any) -> None:
        with torch.device("meta"):
            whole = self.kind(*shape, **options)
        self._hold(whole, axis)
        for name, parameter in list(self.named_parameters()):  # memory for them; the shard rules stay
            setattr(self, name, empty(shard_of(parameter), parameter.dtype, device))

    def _hold(self, conv: nn.Conv2d | nn.Conv3d, axis: Axis) -> None:
        """Copy this rank's part of ``conv``."""
        nn.Module.__init__(self)
        if type(conv) is not self.kind:
            raise ConfigError(
                f"{type(conv).__name__} isn't torch.nn.{self.kind.__name__}, the only class that "
                f"{type(self).__name__} supports"
            )
        self.axis = axis
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self._channels = -1 - len(conv.kernel_size)  # their dim, whether there is a batch or not
        self.padding, self.dilation, self.padding_mode = conv.padding, conv.dilation, conv.padding_mode
        # reflect, replicate and circular padding, applied before, with torch's own amounts for F.pad
        self._pad = None if conv.padding_mode == "zeros" else list(conv._reversed_padding_repeated_twice)
        # with groups the weight's rows are output channels, each over its own group's inputs
        dim = 1 if self.by_input and conv.groups == 1 else 0
        mine = self._share((self.out_channels, self.in_channels)[dim], axis.rank)
        spans = (mine,) if mine else ()
        self.weight = cut(conv.weight, Shard(tuple(conv.weight.shape), dim, spans))
        spans = (range(conv.out_channels),) if self.by_input else spans
        self.bias = None if conv.bias is None else cut(conv.bias, Shard((conv.out_channels,), 0, spans))

    def _share(self, channels: int, rank: int) -> range:
        """Which of all input or output channels are a rank's: those of whole groups, where there are some."""
        each = channels // self.groups if self.groups > 1 else 1
        mine = partition.split(channels // each, self.axis.size)[rank]
        return range(mine.start * each, mine.stop * each)

    def _take_inputs(self, x: Tensor) -> Tensor:
        mine = self._share(self.in_channels, self.axis.rank)
        return x.narrow(self._channels, mine.start, len(mine))

    def _gather_outputs(self, y: Tensor) -> Tensor:
        sizes = [len(self._share(self.out_channels, rank)) for rank in range(self.axis.size)]
        return collectives.all_gather(y, self.axis, self._channels, sizes)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight, padding, channels = self.weight, self.padding, self._channels
        if self._pad is not None:
            x = F.pad(x, self._pad, mode=self.padding_mode) if x.shape[channels] else _grow(x, self._pad)
            padding = (0,) * len(self.kernel_size)
        if weight.numel():
            groups = x.shape[channels] // weight.shape[1]
            return self.function(x, weight, bias, self.stride, padding, self.dilation, groups)
        # no channels on this rank: only the output's shape is needed, from meta tensors
        one = torch.empty(1, 1, *self.kernel_size, dtype=x.dtype, device="meta")
        like = x.new_empty(*x.shape[:channels], 1, *x.shape[channels + 1 :], device="meta")
        size = self.function(like, one, None, self.stride, padding, self.dilation).shape[channels + 1 :]
        out = x.new_zeros(*x.shape[:channels], weight.shape[0], *size)
        return out if bias is None else out + self._spread(bias)

    def _spread(self, bias: Tensor) -> Tensor:
        """A number a channel, for all places."""
        return bias.view(-1, *[1] * len(self.kernel_size))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, here={tuple(self.weight.shape[:2])}, "
            f"{self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


class _ColumnParallelConv(_ParallelConv):
    by_input = False

    def __init__(self, *shape: Any, axis: Axis, gather_output: bool = False, **options: Any) -> None:
        super().__init__(*shape, axis=axis, **options)
        self.gather_output = gather_output

    @classmethod
    def from_conv(cls, conv: nn.Conv2d | nn.Conv3d, axis: Axis, gather_output: bool = False) -> Self:
        """This rank's copy of its part of ``conv``."""
        layer = cls.__new__(cls)
        layer._hold(conv, axis)
        layer.gather_output = gather_output
        return layer

    def share(self, rank: int) -> range:
        """The output channels of ``rank``."""
        return self._share(self.out_channels, rank)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, [T,] H, W)`` to ``(N, this rank's channels, [T',] H', W')``; ``gather_output``: to all.

        N may be left out, as in torch's classes.
        """
        y = self._convolve(self._take_inputs(x) if self.groups > 1 else x, self.bias)
        return self._gather_outputs(y) if self.gather_output else y


class ColumnParallelConv2d(_ColumnParallelConv):
    """A convolution in which each rank computes some of the output channels, in order; the first ranks one more.

    Args:
        shape, options: as for ``torch.nn.Conv2d``, of the whole convolution; only whole groups are split. The input is
            whole on every rank; each rank holds the bias of its own channels.
        axis: the ranks that share the output channels.
        gather_output: return all channels on every rank (one all-gather) instead of this rank's.
    """

    kind, function = nn.Conv2d, staticmethod(F.conv2d)


class ColumnParallelConv3d(_ColumnParallelConv):
    """The same of a 3-D convolution: :class:`ColumnParallelConv2d`."""

    kind, function = nn.Conv3d, staticmethod(F.conv3d)


class _RowParallelConv(_ParallelConv):
    by_input = True

    def __init__(self, *shape: Any, axis: Axis, input_is_parallel: bool = True, **options: Any) -> None:
        super().__init__(*shape, axis=axis, **options)
        self.input_is_parallel = input_is_parallel

    @classmethod
    def from_conv(cls, conv: nn.Conv2d | nn.Conv3d, axis: Axis, input_is_parallel: bool = True) -> Self:
        """This rank's copy of its part of ``conv``."""
        layer = cls.__new__(cls)
        layer._hold(conv, axis)
        layer.input_is_parallel = input_is_parallel
        return layer

    def share(self, rank: int) -> range:
        """The input channels of ``rank``."""
        return self._share(self.in_channels, rank)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, this rank's channels, [T,] H, W)``, or all, to ``(N, out_channels, [T',] H', W')`` on every rank.

        N may be left out, as in torch's classes.
        """
        if self.axis.size == 1:
            return self._convolve(x, self.bias)
        y = self._convolve(x if self.input_is_parallel else self._take_inputs(x), None)
        # with groups every rank has outputs of its own, and nothing is added up
        y = self._gather_outputs(y) if self.groups > 1 else collectives.all_reduce(y, self.axis)
        return y if self.bias is None else y + self._spread(self.bias)


class RowParallelConv2d(_RowParallelConv):
    """A convolution in which each rank holds some of the input channels; the products are summed over ranks.

    One all-reduce. The bias is whole on every rank and added once, after the all-reduce.

    Args:
        shape, options: as for ``torch.nn.Conv2d``, of the whole convolution; only whole groups are split.
        axis: the ranks that share the input channels.
        input_is_parallel: the input has only this rank's channels (a column-parallel convolution's output); False: it
            is whole, and this layer takes its own channels.
    """

    kind, function = nn.Conv2d, staticmethod(F.conv2d)


class RowParallelConv3d(_RowParallelConv):
    """The same of a 3-D convolution: :class:`RowParallelConv2d`."""

    kind, function = nn.Conv3d, staticmethod(F.conv3d)


def _grow(x: Tensor, pad: list[int]) -> Tensor:
    """No channels of the padded size: ``F.pad`` takes none in other modes than zeros."""
    dims = len(pad) // 2
    sizes = [x.shape[-1 - i] + pad[2 * i] + pad[2 * i + 1] for i in reversed(range(dims))]
    return x.new_empty(*x.shape[:-dims], *sizes)
