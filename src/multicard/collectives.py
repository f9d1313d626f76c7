"""Communication between ranks: a dozen short functions on an :class:`~multicard.axis.Axis`.

On an axis of size 1 each is the identity. Sizes may differ between ranks: the caller passes every rank's (from
``partition``), so no collective is needed to learn them. Shared-memory groups are called directly, which halves the
time of a decode step's small messages and needs no padding for uneven sizes. Other groups go through
torch.distributed's in-place calls (eager functional collectives cost ten times as much each), which Dynamo rewrites
under ``torch.compile``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.axis import Axis
from multicard.errors import ConfigError

if TYPE_CHECKING:
    from multicard.backends.shm.group import Group

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
HALF = (torch.float16, torch.bfloat16)

# its name since torch 2.13, and the older one
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _shm(axis: Axis) -> Group | None:
    """The axis's shared-memory group, to be called directly; None elsewhere, and where Dynamo traces."""
    return None if torch.compiler.is_compiling() else getattr(axis.group, "shm", None)


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Every rank's ``x`` combined; the result may be ``x`` itself, overwritten. One all-reduce.

    Half types are added in float32: by shm itself and by accelerators' backends, through a copy elsewhere (gloo).
    """
    if axis.size == 1:
        return x
    shm = _shm(axis)
    if shm is not None:
        x = x.contiguous()
        shm.all_reduce(x, op)
        return x
    # gloo on the CPU would round half types after every addition
    narrow = op == "sum" and x.dtype in HALF and x.device.type == "cpu" and "gloo" in dist.get_backend(axis.group)
    wide = (x.float() if narrow else x).contiguous()
    dist.all_reduce(wide, REDUCE_OPS[op], group=axis.group)
    return wide.to(x.dtype)


def all_gather(x: Tensor, axis: Axis, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """Every rank's ``x``, concatenated in rank order along ``dim``. One all-gather.

    Args:
        x: of the same shape on all ranks, except along ``dim``.
        sizes: every rank's length along ``dim``; None: all have this rank's length.
    """
    if axis.size == 1:
        return x
    dim = dim % x.ndim
    sizes = tuple(sizes) if sizes is not None else (x.shape[dim],) * axis.size
    _check_sizes("all_gather", x.shape[dim], sizes, axis)
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    counts = [math.prod(before) * size * math.prod(after) for size in sizes]
    flat = _gather_flat(x.contiguous().view(-1), counts, axis)
    if math.prod(before) == 1:
        return flat.view(*before, sum(sizes), *after)
    parts = [part.view(*before, size, *after) for part, size in zip(flat.split(counts), sizes, strict=True)]
    return torch.cat(parts, dim)


def _gather_flat(x: Tensor, counts: list[int], axis: Axis) -> Tensor:
    """Every rank's elements, ``counts`` of them, in rank order."""
    shm = _shm(axis)
    if shm is not None:
        out = x.new_empty(sum(counts))
        if min(counts) == max(counts):
            shm.all_gather_single(out, x)
        else:
            shm.all_gather(out.split_with_sizes(counts), x)
        return out
    longest = max(counts)
    if x.numel() < longest:  # other backends gather one size, and sizes differ by one row at most
        x = torch.cat([x, x.new_zeros(longest - x.numel())])
    out = x.new_empty(axis.size * longest)
    if longest:
        _all_gather_single(out, x, group=axis.group)
    if min(counts) == longest:
        return out
    return torch.cat([part[:count] for part, count in zip(out.view(axis.size, -1), counts, strict=True)])


def all_to_all(
    x: Tensor, axis: Axis, send_sizes: Sequence[int] | None = None, receive_sizes: Sequence[int] | None = None
) -> Tensor:
    """Slice j of this rank's rows goes to rank j; received slices are concatenated in rank order. One all-to-all.

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
    shm = _shm(axis)
    if shm is not None:
        shm.all_to_all_single(out, x, receive, send).wait()
    else:
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
    return out


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """The ``x`` of rank ``source`` of the axis, written into every rank's ``x`` (of the same shape). One broadcast."""
    if axis.size == 1:
        return x
    x = x.contiguous()
    shm = _shm(axis)
    if shm is not None:
        shm.broadcast(x, source)
    else:
        dist.broadcast(x, group=axis.group, group_src=source)
    return x


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis has called this."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


class RingShift:
    """Tensors passed to the next rank of an axis while this one computes.

    ``start`` posts the sends to rank+1 and the receives from rank-1 and returns at once; ``wait`` returns the received
    tensors. Each tensor is one point-to-point message each way. Sent tensors must not be changed before ``wait``.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._received: list[Tensor] = []
        self._works: list[dist.Work] = []

    def start(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None = None) -> None:
        """Send ``tensors`` to rank+1; ``shapes`` are those that rank-1 sends (None: the shapes of ``tensors``)."""
        shapes = [t.shape for t in tensors] if shapes is None else shapes
        if self.axis.size == 1:
            self._received = list(tensors)
            return
        self._received = [t.new_empty(tuple(shape)) for t, shape in zip(tensors, shapes, strict=True)]
        sends, receives = ([t for t in group if t.numel()] for group in (tensors, self._received))
        to, source = (self.axis.rank + 1) % self.axis.size, (self.axis.rank - 1) % self.axis.size
        shm = _shm(self.axis)
        if shm is not None:
            self._works = [shm.exchange(sends, to, receives, source)]
            return
        calls = itertools.chain(
            (dist.P2POp(dist.isend, t.contiguous(), group=self.axis.group, group_peer=to) for t in sends),
            (dist.P2POp(dist.irecv, t, group=self.axis.group, group_peer=source) for t in receives),
        )
        self._works = dist.batch_isend_irecv(list(calls)) if sends or receives else []

    def wait(self) -> list[Tensor]:
        """The tensors from rank-1, in order."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._received


def _check_sizes(name: str, mine: int, sizes: Sequence[int], axis: Axis) -> None:
    if len(sizes) != axis.size or sizes[axis.rank] != mine:
        raise ConfigError(
            f"{name}: sizes={tuple(sizes)} on rank {axis.rank} of {axis.size}, which holds {mine}: "
            "pass every rank's length, in rank order"
        )
