"""A :class:`~multicard.backends.shm.group.Group` behind ``torch.distributed``'s calls; importing registers it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from multicard.backends.python_group import PythonGroup
from multicard.backends.reductions import op_name
from multicard.backends.shm.group import Group
from multicard.backends.shm.work import ShmWork
from multicard.errors import ConfigError
from multicard.place import checking

# torch's stubs spell every way to call each method; here are those that torch.distributed and its C++ side use
# mypy: disable-error-code="override, assignment"


class ShmProcessGroup(PythonGroup):
    """A :class:`~multicard.backends.shm.group.Group` as ``torch.distributed`` knows it.

    Attributes:
        shm: the group itself, for callers that want no wrapping.
    """

    backend = "shm"

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, ranks: Sequence[int] | None = None
    ) -> None:
        super().__init__(rank, size)
        checked = checking()
        self.shm = Group(store, rank, ranks or range(size), timeout.total_seconds(), checked=checked)
        self._coalesced: list[ShmWork] | None = None

    # ---- collectives: with the lists that c10d passes, and under each name that it has had

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> ShmWork:
        op = _op(opts)
        for x in _list(tensors):
            self.shm.all_reduce(x, op)
        return ShmWork(tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: Any, opts: Any, timeout: Any = None) -> ShmWork:
        for x in _list(tensors):
            self.shm.broadcast(x, _root(opts))
        return ShmWork(tensors)

    def allgather(self, outs: Any, inputs: Any, opts: Any = None) -> ShmWork:
        if isinstance(inputs, Tensor):
            outs, inputs = [outs], [inputs]
        for parts, x in zip(outs, inputs, strict=True):
            self.shm.all_gather(parts, x)
        return ShmWork(outs)

    allgather_coalesced = allgather

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> ShmWork:
        self.shm.all_gather_single(out, x)
        return ShmWork((out,))

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> ShmWork:
        for out, x in zip(outs, inputs, strict=True):
            self.shm.all_gather_single(out, x)
        return ShmWork(outs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> ShmWork:
        if isinstance(outs, Tensor):
            outs, inputs = [outs], [inputs]
        for out, parts in zip(outs, inputs, strict=True):
            self.shm.reduce_scatter(out, parts, _op(opts))
        return ShmWork(outs)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> ShmWork:
        size = self.shm.size
        if x.numel() != out.numel() * size:
            raise ConfigError(f"reduce_scatter: {x.numel()} elements are not {size} ranks × {out.numel()}")
        self.shm.reduce_scatter(out, x.contiguous().view(size, -1).unbind() if x.numel() else [x] * size, _op(opts))
        return ShmWork((out,))

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> ShmWork:
        for out, x in zip(outs, inputs, strict=True):
            self.reduce_scatter_single(out, x, opts)
        return ShmWork(outs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce(self, tensors: Any, opts: Any, op: Any = None, timeout: Any = None) -> ShmWork:
        for x in _list(tensors):
            self.shm.reduce(x, _root(opts), _op(opts if op is None else op))
        return ShmWork(tensors)

    def gather(self, outs: Any, inputs: Any, opts: Any, timeout: Any = None) -> ShmWork:
        for i, x in enumerate(inputs):
            self.shm.gather(outs[i] if outs else [], x, opts.rootRank)
        return ShmWork(outs)

    def scatter(self, outs: Any, inputs: Any, opts: Any, timeout: Any = None) -> ShmWork:
        for i, out in enumerate(outs):
            self.shm.scatter(out, inputs[i] if inputs else [], opts.rootRank)
        return ShmWork(outs)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> ShmWork:
        return self.shm.all_to_all_single(out, x, out_splits, in_splits)

    alltoall_base = all_to_all_single

    def alltoall(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> ShmWork:
        return self.shm.all_to_all(outs, inputs)

    def barrier(self, opts: Any = None, timeout: Any = None) -> ShmWork:
        self.shm.barrier()
        return ShmWork()

    # ---- messages

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> ShmWork:
        return self._started(self.shm.send(tensors, to, tag))

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> ShmWork:
        return self._started(self.shm.recv(tensors, source, tag))

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> ShmWork:
        return self._started(self.shm.recv_from_any(tensors, tag))

    def _started(self, work: ShmWork) -> ShmWork:
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> ShmWork:
        works, self._coalesced = self._coalesced or [], None
        return ShmWork((), self.shm, [transfer for work in works for transfer in work.transfers])

    # ---- life

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self.shm.set_timeout(timeout.total_seconds())

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leave the group: a peer that still waits for this rank gets an error at once."""
        self.shm.close()

    abort = shutdown


def _list(tensors: Any) -> Sequence[Tensor]:
    return (tensors,) if isinstance(tensors, Tensor) else tensors


def _op(opts: Any) -> str:
    return "sum" if opts is None else op_name(getattr(opts, "reduceOp", opts))


def _root(opts: Any) -> int:
    return opts if isinstance(opts, int) else int(opts.rootRank)


def _create(options: Any, _: object) -> ShmProcessGroup:
    ranks = options.global_ranks_in_group
    return ShmProcessGroup(options.store, options.group_rank, options.group_size, options.timeout, ranks)


if "shm" not in dist.Backend.backend_list:
    dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])
