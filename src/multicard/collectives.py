"""What ranks say to each other: a dozen short functions on an :class:`~multicard.mesh.Axis`.

On an axis of size 1 each is the identity. Sizes may differ between ranks: the caller passes everybody's (from
``partition``), so none is spent on asking. Eager code runs torch.distributed's in-place calls (functional collectives
cost ten times as much each); Dynamo rewrites them under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.errors import ConfigError
from multicard.mesh import Axis

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
HALF = (torch.float16, torch.bfloat16)


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Everybody's ``x`` combined; the result may be ``x`` itself, overwritten. One all-reduce.

    Half types are added in float32: by shm itself and by accelerators' backends, through a copy elsewhere (gloo).
    """
    if axis.size == 1:
        return x
    if op == "sum" and x.dtype in HALF and x.device.type == "cpu" and not _adds_in_float32(axis):
        wide = x.float()
        dist.all_reduce(wide, REDUCE_OPS[op], group=axis.group)
        return wide.to(x.dtype)
    x = x.contiguous()
    dist.all_reduce(x, REDUCE_OPS[op], group=axis.group)
    return x


def _adds_in_float32(axis: Axis) -> bool:
    return dist.get_backend(axis.group) != "gloo"


def all_gather(x: Tensor, axis: Axis, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """Everybody's ``x``, concatenated in rank order along ``dim``. One all-gather.

    Args:
        x: equal on all ranks but for ``dim``.
        sizes: every rank's length along ``dim``; None: all have this rank's.
    """
    if axis.size == 1:
        return x
    sizes = tuple(sizes) if sizes is not None else (x.shape[dim],) * axis.size
    _check_sizes("all_gather", x.shape[dim], sizes, axis)
    longest = max(sizes)
    local = x.movedim(dim, 0)
    if local.shape[0] < longest:  # pad: no backend but shm gathers uneven sizes, and shares differ by one row
        local = torch.cat([local, local.new_zeros(longest - local.shape[0], *local.shape[1:])])
    out = local.new_empty(axis.size * longest, *local.shape[1:])
    if out.numel():
        dist.all_gather_into_tensor(out, local.contiguous(), group=axis.group)
    if any(size != longest for size in sizes):
        out = torch.cat([part[:size] for part, size in zip(out.chunk(axis.size), sizes, strict=True)])
    return out.movedim(0, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """Everybody's ``x`` added up; this rank's slice of it along ``dim``. One reduce-scatter.

    Args:
        x: the same shape on all ranks.
        sizes: the lengths of the slices by rank; None: equal ones.

    Raises:
        ConfigError: ``x`` doesn't divide and ``sizes`` weren't given, or they don't add up.
    """
    if axis.size == 1:
        return x
    sizes = tuple(sizes) if sizes is not None else (x.shape[dim] // axis.size,) * axis.size
    if sum(sizes) != x.shape[dim] or len(sizes) != axis.size:
        raise ConfigError(f"reduce_scatter: slices of {sizes} over {axis.size} ranks don't make {x.shape[dim]} rows")
    if any(size != sizes[0] for size in sizes):
        return all_reduce(x.clone(), axis).split(list(sizes), dim)[axis.rank]
    local = x.movedim(dim, 0).contiguous()
    wide = local.float() if local.dtype in HALF and local.device.type == "cpu" and not _adds_in_float32(axis) else local
    out = wide.new_empty(sizes[0], *wide.shape[1:])
    if out.numel():
        dist.reduce_scatter_tensor(out, wide, group=axis.group)
    return out.to(x.dtype).movedim(0, dim)


def all_to_all(
    x: Tensor, axis: Axis, send_sizes: Sequence[int] | None = None, receive_sizes: Sequence[int] | None = None
) -> Tensor:
    """Slice j of this rank's rows goes to rank j; what arrives is concatenated in rank order. One all-to-all.

    Args:
        x: ``(rows, ...)``; slices are along dim 0.
        send_sizes: rows for each rank; None: equal.
        receive_sizes: rows from each rank; None: the same as ``send_sizes``.
    """
    if axis.size == 1:
        return x
    send = list(send_sizes) if send_sizes is not None else [x.shape[0] // axis.size] * axis.size
    receive = list(receive_sizes) if receive_sizes is not None else send
    if sum(send) != x.shape[0] or len(send) != axis.size or len(receive) != axis.size:
        raise ConfigError(f"all_to_all: sending {send} over {axis.size} ranks doesn't make {x.shape[0]} rows")
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
    return out


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """``x`` of the axis's rank ``source``, on every rank (written into ``x``, same shape everywhere). One broadcast."""
    if axis.size == 1:
        return x
    x = x.contiguous()
    dist.broadcast(x, group=axis.group, group_src=source)
    return x


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


class RingShift:
    """Tensors passed to the next rank of an axis while this one computes.

    ``start`` posts the sends to rank+1 and the receives from rank-1 and returns at once; ``wait`` returns what arrived.
    Point to point, one message a tensor each way.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._received: list[Tensor] = []
        self._works: list[dist.Work] = []

    def start(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None = None) -> None:
        """Send ``tensors`` on; ``shapes`` are those of what rank-1 sends (None: the same as these)."""
        shapes = [t.shape for t in tensors] if shapes is None else shapes
        self._received = [t.new_empty(tuple(shape)) for t, shape in zip(tensors, shapes, strict=True)]
        if self.axis.size == 1:
            self._received = list(tensors)
            return
        to, source = (self.axis.rank + 1) % self.axis.size, (self.axis.rank - 1) % self.axis.size
        group = self.axis.group
        sends = [dist.P2POp(dist.isend, t.contiguous(), group=group, group_peer=to) for t in tensors if t.numel()]
        receives = [dist.P2POp(dist.irecv, t, group=group, group_peer=source) for t in self._received if t.numel()]
        self._works = dist.batch_isend_irecv(sends + receives) if sends or receives else []

    def wait(self) -> list[Tensor]:
        """What rank-1 sent, in order."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._received


def _check_sizes(name: str, mine: int, sizes: Sequence[int], axis: Axis) -> None:
    if len(sizes) != axis.size or sizes[axis.rank] != mine:
        raise ConfigError(
            f"{name}: sizes={tuple(sizes)} on rank {axis.rank} of {axis.size}, which holds {mine}: "
            "give every rank's length, in rank order"
        )
