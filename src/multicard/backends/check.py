"""Backend "checked_gloo": gloo, where ranks first agree on what they are about to do.

gloo itself moves bytes of whatever sizes and types meet: different dtypes, reductions or orders give garbage in
silence, different lengths abort the process. Here every collective is preceded by an all-gather of one short record of
it, and every message by one; where they differ, every rank raises the same MismatchError and no data has moved.
The shm backend checks itself, so this is for gloo alone.
"""

from __future__ import annotations

import concurrent.futures
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends.agreement import RECORD, Agreement, from_record, to_record
from multicard.backends.calls import sites
from multicard.backends.python_group import PythonGroup
from multicard.backends.reductions import op_name
from multicard.errors import MismatchError, UnsupportedError

# torch's stubs spell every way to call each method; here are those that torch.distributed and its C++ side use
# mypy: disable-error-code="override, assignment"

NAME = "checked_gloo"


class CheckedGloo(PythonGroup):
    """A gloo process group whose ranks compare what they call.

    Compared: the operation, reduction, root, dtype, shapes, splits and, but for operations with a root (which root and
    others often call from different lines), the call site.
    """

    backend = NAME

    def __init__(self, store: dist.Store, ranks: Sequence[int], rank: int, timeout: datetime.timedelta) -> None:
        size = len(ranks)
        super().__init__(rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        gloo._set_sequence_number_for_group()
        self._inner = dist.ProcessGroup(store, rank, size)
        self._inner._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._inner._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._ranks = tuple(ranks)
        self._agreement = Agreement(self._inner, ranks)
        self._receivers: dict[int, concurrent.futures.ThreadPoolExecutor] = {}

    # ---- collectives: with the lists that c10d passes, and under each name that it has had

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        tensors = _list(tensors)
        self._agreement.reach(f"all_reduce({_about(tensors)}, {_op(opts)})")
        return self._inner.allreduce(tensors, opts if opts is not None else dist.AllreduceOptions())

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: Any, opts: Any, timeout: Any = None) -> dist.Work:
        self._agreement.reach(f"broadcast({_about(_list(tensors))}, root {opts.rootRank})")
        return self._inner.broadcast(_list(tensors), opts)

    def reduce(self, tensors: Any, opts: Any, timeout: Any = None) -> dist.Work:
        self._agreement.reach(f"reduce({_about(_list(tensors))}, {_op(opts)}, root {opts.rootRank})")
        return self._inner.reduce(_list(tensors), opts)

    def allgather(self, outs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        self._agreement.reach(f"all_gather({', '.join(_about(parts) for parts in outs)})")
        return self._inner.allgather(outs, inputs)

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        self._agreement.reach(f"all_gather({_about([out, x])})")
        return self._inner._allgather_base(out, x)

    _allgather_base = all_gather_single

    def reduce_scatter(self, outs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        self._agreement.reach(f"reduce_scatter({', '.join(_about(parts) for parts in inputs)}, {_op(opts)})")
        return self._inner.reduce_scatter(outs, inputs, opts)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        self._agreement.reach(f"reduce_scatter({_about([out, x])}, {_op(opts)})")
        return self._inner._reduce_scatter_base(out, x, opts)

    _reduce_scatter_base = reduce_scatter_single

    def all_gather_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        works = [self.all_gather_single(out, x) for out, x in zip(outs, inputs, strict=True)]
        return _Done(lambda: [work.wait() for work in works])

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        works = [self.reduce_scatter_single(out, x, opts) for out, x in zip(outs, inputs, strict=True)]
        return _Done(lambda: [work.wait() for work in works])

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def gather(self, outs: Any, inputs: Any, opts: Any, timeout: Any = None) -> dist.Work:
        self._agreement.reach(f"gather({_about(inputs)}, root {opts.rootRank})")
        return self._inner.gather(outs, inputs, opts)

    def scatter(self, outs: Any, inputs: Any, opts: Any, timeout: Any = None) -> dist.Work:
        self._agreement.reach(f"scatter({_about(outs)}, root {opts.rootRank})")
        return self._inner.scatter(outs, inputs, opts)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> dist.Work:
        sent, received = _rows(x, in_splits, self.size()), _rows(out, out_splits, self.size())
        self._agreement.reach(f"all_to_all({_dtype(x)}, rows of {tuple(x.shape[1:])})", sent, received)
        return self._inner.alltoall_base(out, x, list(out_splits), list(in_splits))

    alltoall_base = all_to_all_single

    def alltoall(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        self._agreement.reach(
            f"all_to_all({_dtype(inputs[0])})", [x.numel() for x in inputs], [x.numel() for x in outs]
        )
        return self._inner.alltoall(list(outs), list(inputs))

    def barrier(self, opts: Any = None, timeout: Any = None) -> dist.Work:
        self._agreement.reach("barrier()")  # which is one
        return _Done()

    # ---- messages: a record of each goes ahead of it

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> dist.Work:
        works = []
        for x in tensors:
            record = to_record(_message(x))
            works += [self._inner.send([record], to, tag), self._inner.send([x], to, tag)]
        return _Done(lambda: [work.wait() for work in works])

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> dist.Work:
        _, line = sites()

        def receive() -> None:
            for x in tensors:
                record = torch.empty(RECORD, dtype=torch.uint8)
                self._inner.recv([record], source, tag).wait()
                if from_record(record) != _message(x):
                    peer, me = self._ranks[source], self._ranks[self.rank()]
                    raise MismatchError(
                        f"rank {peer} sent {from_record(record)} and rank {me} receives {_message(x)} at {line}",
                        rank=peer,
                        collective="recv",
                    )
                self._inner.recv([x], source, tag).wait()

        # a thread for each peer, so that receives from it stay in order and irecv returns at once
        if source not in self._receivers:
            self._receivers[source] = concurrent.futures.ThreadPoolExecutor(1, "multicard-receive")
        return _Done(self._receivers[source].submit(receive).result)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> dist.Work:
        raise UnsupportedError("a receive from any rank can't be checked: name the source, or run without the check")

    # ---- life

    def _set_sequence_number_for_group(self) -> None:
        self._agreement.calls = 0

    def _get_sequence_number_for_group(self) -> int:
        return self._agreement.calls

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._inner.set_timeout(timeout)

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        for receiver in self._receivers.values():
            receiver.shutdown(wait=False, cancel_futures=True)
        self._inner.shutdown()

    abort = shutdown

    def setGroupName(self, name: str) -> None:  # noqa: N802
        super().setGroupName(name)
        self._inner._set_group_name(name)  # type: ignore[arg-type]

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        super().setGroupDesc(desc)
        self._agreement.axis = desc.removeprefix("mesh_") if desc.startswith("mesh_") else ""

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc


class _Done(dist.Work):
    """Work that is done when ``finish`` returns."""

    def __init__(self, finish: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self._finish = finish

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if self._finish is not None:
            self._finish()
            self._finish = None
        return True

    def is_completed(self) -> bool:
        return self._finish is None

    def is_success(self) -> bool:
        return self._finish is None


def _list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _about(tensors: Sequence[Tensor]) -> str:
    return " ".join(f"{_dtype(x)}{tuple(x.shape)}" for x in tensors)


def _message(x: Tensor) -> str:
    return f"{x.numel()} × {_dtype(x)}"


def _op(opts: Any) -> str:
    return "sum" if opts is None else op_name(opts.reduceOp)


def _rows(x: Tensor, splits: Sequence[int], parts: int) -> list[int]:
    return list(splits) or [x.shape[0] // parts] * parts


def _create(options: Any, _: object) -> CheckedGloo:
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    return CheckedGloo(options.store, ranks, options.group_rank, options.timeout)


if NAME not in dist.Backend.backend_list:
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
