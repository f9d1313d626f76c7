"""A group of ours as a process group of ``torch.distributed``: c10d's lists and options become tensors and names."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends.reductions import op_name
from multicard.backends.work import Work
from multicard.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from multicard.backends.gloo import GlooGroup
    from multicard.backends.shm.group import Group

# torch's stubs list every way to call each method; here are those that torch.distributed and its C++ side use
# mypy: disable-error-code="override, assignment"


class ProcessGroup(dist.ProcessGroup):
    """A process group for CPU tensors.

    Every method has all the names that c10d has used for it.

    Attributes:
        backend: the name under which it is registered.
    """

    backend: ClassVar[str]
    counts_collectives_alone = True  # sequence numbers are the same on all ranks, whatever messages they have sent
    supports_coalescing = False  # batch_isend_irecv then starts one message at a time, which never blocks

    def __init__(self, group: Group | GlooGroup) -> None:
        super().__init__(group.rank, group.size)  # type: ignore[call-arg]
        self._group = group
        self._names = {"name": "", "desc": ""}
        self._coalesced: list[Work] | None = None

    # ---- collectives

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Work:
        op = _op(opts)
        for x in _list(tensors):
            self._group.all_reduce(x, op)
        return Work(tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: Any, opts: Any, timeout: Any = None) -> Work:
        for x in _list(tensors):
            self._group.broadcast(x, _root(opts))
        return Work(tensors)

    def allgather(self, outs: Any, inputs: Any, opts: Any = None) -> Work:
        if isinstance(inputs, Tensor):
            outs, inputs = [outs], [inputs]
        for parts, x in zip(outs, inputs, strict=True):
            self._group.all_gather(parts, x)
        return Work(outs)

    allgather_coalesced = allgather

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Work:
        self._group.all_gather_single(out, x)
        return Work((out,))

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Work:
        for out, x in zip(outs, inputs, strict=True):
            self._group.all_gather_single(out, x)
        return Work(outs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Work:
        if isinstance(outs, Tensor):
            outs, inputs = [outs], [inputs]
        for out, parts in zip(outs, inputs, strict=True):
            self._group.reduce_scatter(out, parts, _op(opts))
        return Work(outs)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Work:
        size = self._group.size
        if x.numel() != out.numel() * size:
            raise ConfigError(f"reduce_scatter: {x.numel()} elements are not {size} ranks × {out.numel()}")
        self._group.reduce_scatter(out, x.contiguous().view(size, *out.shape).unbind(), _op(opts))
        return Work((out,))

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        for out, x in zip(outs, inputs, strict=True):
            self.reduce_scatter_single(out, x, opts)
        return Work(outs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce(self, tensors: Any, opts: Any, op: Any = None, timeout: Any = None) -> Work:
        for x in _list(tensors):
            self._group.reduce(x, _root(opts), _op(opts if op is None else op))
        return Work(tensors)

    def gather(self, outs: Any, inputs: Any, opts: Any, timeout: Any = None) -> Work:
        for i, x in enumerate(inputs):
            self._group.gather(outs[i] if outs else [], x, opts.rootRank)
        return Work(outs)

    def scatter(self, outs: Any, inputs: Any, opts: Any, timeout: Any = None) -> Work:
        for i, out in enumerate(outs):
            self._group.scatter(out, inputs[i] if inputs else [], opts.rootRank)
        return Work(outs)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> Work:
        return self._group.all_to_all_single(out, x, out_splits, in_splits)

    alltoall_base = all_to_all_single

    def alltoall(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Work:
        return self._group.all_to_all(outs, inputs)

    def barrier(self, opts: Any = None, timeout: Any = None) -> Work:
        self._group.barrier()
        return Work()

    # ---- point-to-point messages

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> Work:
        return self._started(self._group.send(tensors, to, tag))

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Work:
        return self._started(self._group.recv(tensors, source, tag))

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        return self._started(self._group.recv_from_any(tensors, tag))

    def _started(self, work: Work) -> Work:
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> Work:
        works, self._coalesced = self._coalesced or [], None
        driver = next((work.driver for work in works), None)
        return Work((), driver, [message for work in works for message in work.messages])

    # ---- life

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._group.set_timeout(timeout.total_seconds())

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leave the group: on shm, a peer that still waits for this rank gets an error at once."""
        self._group.close()

    abort = shutdown

    # ---- who it is

    def _get_backend(self, device: torch.device) -> Any:
        if torch.device(device).type != "cpu":
            raise UnsupportedError(f"backend {self.backend} is for CPU tensors, not {device}")
        return self

    def getBackendName(self) -> str:  # noqa: N802
        return self.backend

    name = getBackendName

    def getRank(self) -> int:  # noqa: N802
        return self._group.rank

    def getSize(self) -> int:  # noqa: N802
        return self._group.size

    rank, size = getRank, getSize

    def _set_sequence_number_for_group(self) -> None:
        """Called by c10d once a group is made; does nothing, since the count starts at 0."""

    def _get_sequence_number_for_group(self) -> int:
        return self._group.calls

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._names["name"] = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._names["name"]

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._names["desc"] = desc
        self._group.agreement.axis = desc.removeprefix("mesh_") if desc.startswith("mesh_") else ""

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._names["desc"]

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name, group_desc = property(getGroupName), property(getGroupDesc)


def register(kind: type[ProcessGroup], make: Callable[[Any, int, Sequence[int], datetime.timedelta], Any]) -> None:
    """Register a backend with ``torch.distributed``: a ``kind`` around ``make(store, rank, ranks, timeout)``."""

    def create(options: Any, _: object) -> ProcessGroup:
        ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        return kind(make(options.store, options.group_rank, ranks, options.timeout))

    if kind.backend not in dist.Backend.backend_list:
        dist.Backend.register_backend(kind.backend, create, extended_api=True, devices=["cpu"])


def _list(tensors: Any) -> Sequence[Tensor]:
    return (tensors,) if isinstance(tensors, Tensor) else tensors


def _op(opts: Any) -> str:
    return "sum" if opts is None else op_name(getattr(opts, "reduceOp", opts))


def _root(opts: Any) -> int:
    return opts if isinstance(opts, int) else int(opts.rootRank)
