"""Communication between ranks: a dozen short functions on an :class:`~multicard.axis.Axis`.

On an axis of size 1 each is the identity. Sizes may differ between ranks: the caller passes every rank's (from
``partition``), so no collective is needed to learn them. Under ``torch.compile`` each is one operator of the graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from multicard.axis import Axis
from multicard.backends import eager, traced
from multicard.errors import ConfigError


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Every rank's ``x`` combined; the result may be ``x`` itself, overwritten. One all-reduce.

    Half types are added in float32: by shm itself and by accelerators' backends, through a copy elsewhere (gloo).
    """
    if axis.size == 1:
        return x
    if _is_special(x):
        return handle_torch_function(all_reduce, (x,), x, axis, op)
    engine, group = _engine(axis)
    return engine.all_reduce(x, group, op)


def all_gather(x: Tensor, axis: Axis, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """Every rank's ``x``, concatenated in rank order along ``dim``. One all-gather.

    Args:
        x: of the same shape on all ranks, except along ``dim``.
        sizes: every rank's length along ``dim``; None: all have this rank's length.
    """
    if axis.size == 1:
        return x
    if _is_special(x):
        return handle_torch_function(all_gather, (x,), x, axis, dim, sizes)
    dim = dim % x.ndim
    sizes = tuple(sizes) if sizes is not None else (x.shape[dim],) * axis.size
    _check_sizes("all_gather", x.shape[dim], sizes, axis)
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    counts = [math.prod(before) * size * math.prod(after) for size in sizes]
    engine, group = _engine(axis)
    flat = engine.all_gather(x.contiguous().view(-1), group, counts)
    if math.prod(before) == 1:
        return flat.view(*before, sum(sizes), *after)
    parts = [part.view(*before, size, *after) for part, size in zip(flat.split(counts), sizes, strict=True)]
    return torch.cat(parts, dim)


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
    engine, group = _engine(axis)
    return engine.all_to_all(x, group, send, receive)


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """The ``x`` of rank ``source`` of the axis, written into every rank's ``x`` (of the same shape). One broadcast."""
    if axis.size == 1:
        return x
    engine, group = _engine(axis)
    return engine.broadcast(x, group, source)


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis has called this."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


class Exchange:
    """Messages under way; see :func:`exchange`."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Until all have arrived. The sent tensors may be changed afterwards."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = (), ()


def exchange(sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], axis: Axis) -> Exchange:
    """Start sending tensors, by the rank to send to, and receiving into tensors, by the rank that sends.

    Point-to-point messages, of which empty ones aren't sent: two ranks must agree on the sizes of theirs. Contiguous
    tensors. Returns at once.
    """
    calls = [
        *(dist.P2POp(dist.isend, x, group=axis.group, group_peer=to) for to, x in sends.items() if x.numel()),
        *(dist.P2POp(dist.irecv, x, group=axis.group, group_peer=of) for of, x in receives.items() if x.numel()),
    ]
    return Exchange(dist.batch_isend_irecv(calls) if calls else (), (*sends.values(), *receives.values()))


def _is_special(x: Tensor) -> bool:
    """Whether ``x`` is of a class that says itself what a function of torch is on it, as rows of pictures do."""
    return not torch.compiler.is_compiling() and has_torch_function((x,))


def _engine(axis: Axis) -> tuple[Any, Any]:
    """The module that communicates, and what it calls the axis's group."""
    assert axis.group is not None
    return (traced, axis.group.group_name) if torch.compiler.is_compiling() else (eager, axis.group)


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
        shm = getattr(self.axis.group, "shm", None)
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
