"""gloo with the check before each call; the methods are those of :class:`multicard.backends.shm.group.Group`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends.agreement import Agreement
from multicard.backends.calls import sites, size_code, to_call
from multicard.backends.reductions import TORCH_OPS
from multicard.backends.work import Work
from multicard.errors import MismatchError, UnsupportedError

HEADER = 64
"""Bytes of the header that describes a message and is sent before it."""


@dataclasses.dataclass
class Message:
    """A point-to-point message under way: works to wait for, in order, until it has been received or sent."""

    peer: int
    steps: Sequence[dist.Work | concurrent.futures.Future]
    complete: bool = False

    def finish(self) -> None:
        for step in self.steps:
            step.result() if isinstance(step, concurrent.futures.Future) else step.wait()
        self.complete = True


class GlooGroup:
    """One rank's end of a gloo group; ranks compare their calls before any data moves.

    Collectives return when they are complete. Refusals and errors from peers are gloo's own. In addition, every
    collective may raise MismatchError, on every rank, and a receive may raise it.

    Args:
        store: in which the group's ranks find one another.
        rank: this process's rank within the group.
        ranks: every rank's global rank, for messages.
        timeout: how long one wait may last.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: Sequence[int], timeout: datetime.timedelta) -> None:
        self.rank, self.size, self.ranks, self.calls = rank, len(ranks), tuple(ranks), 0
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, self.size, timeout=timeout)
        self.agreement = Agreement(ranks)
        self._receivers: dict[int, concurrent.futures.ThreadPoolExecutor] = {}

    def _enter(
        self,
        name: str,
        x: Tensor | None = None,
        numel: int = 0,
        detail: int = 0,
        op: str = "sum",
        splits: Sequence[Sequence[int]] = ((), ()),
    ) -> Any:
        """Agree on a collective; see the same method of shm's group."""
        self.calls += 1
        call = to_call(name, x, numel, detail, op)
        error = self.agreement.find_mismatch(self._all_gather_rows, self.calls, call, x, *splits)
        if error is not None:
            raise error
        return self._gloo

    def _all_gather_rows(self, rows: Tensor, x: Tensor) -> None:
        self._gloo._allgather_base(rows.view(-1), x).wait()

    # ---- collectives

    def barrier(self) -> None:
        self._enter("barrier")  # the comparison itself is a barrier

    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        options = _options(dist.AllreduceOptions(), op=op)
        self._enter("all_reduce", x, x.numel(), op=op).allreduce([x], options).wait()

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        sizes = [out.numel() for out in outs]
        self._enter("all_gather", x, sum(sizes), size_code(sizes)).allgather([list(outs)], [x]).wait()

    def all_gather_single(self, out: Tensor, x: Tensor) -> None:
        self._enter("all_gather", x, out.numel(), x.numel())._allgather_base(out, x).wait()

    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: str = "sum") -> None:
        sizes, options = [part.numel() for part in parts], _options(dist.ReduceScatterOptions(), op=op)
        gloo = self._enter("reduce_scatter", out, sum(sizes), size_code(sizes), op)
        gloo.reduce_scatter([out], [list(parts)], options).wait()

    def broadcast(self, x: Tensor, root: int) -> None:
        options = _options(dist.BroadcastOptions(), root)
        self._enter("broadcast", x, x.numel(), root).broadcast([x], options).wait()

    def reduce(self, x: Tensor, root: int, op: str = "sum") -> None:
        options = _options(dist.ReduceOptions(), root, op)
        self._enter("reduce", x, x.numel(), root, op).reduce([x], options).wait()

    def gather(self, outs: Sequence[Tensor], x: Tensor, root: int) -> None:
        options = _options(dist.GatherOptions(), root)
        self._enter("gather", x, x.numel(), root).gather([list(outs)] if outs else [], [x], options).wait()

    def scatter(self, out: Tensor, parts: Sequence[Tensor], root: int) -> None:
        options = _options(dist.ScatterOptions(), root)
        self._enter("scatter", out, out.numel(), root).scatter([out], [list(parts)] if parts else [], options).wait()

    def all_to_all(self, outs: Sequence[Tensor], ins: Sequence[Tensor]) -> Work:
        splits = [x.numel() for x in ins], [x.numel() for x in outs]
        self._enter("all_to_all", ins[0], splits=splits).alltoall(list(outs), list(ins)).wait()
        return Work(outs)

    def all_to_all_single(self, out: Tensor, x: Tensor, receive: Sequence[int] = (), send: Sequence[int] = ()) -> Work:
        splits = self._elements(x, send), self._elements(out, receive)
        self._enter("all_to_all", x, splits=splits).alltoall_base(out, x, list(receive), list(send)).wait()
        return Work((out,))

    def _elements(self, x: Tensor, rows: Sequence[int]) -> list[int]:
        """The sizes of ``x``'s slices along dim 0 by rank; equal ones if no rows are given."""
        width = x[:1].numel()
        return [width * n for n in rows] or [x.numel() // self.size] * self.size

    # ---- point-to-point messages: a header is sent before each

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> Work:
        works = [self._gloo.send([part], to, tag) for x in tensors for part in (_header(x), x)]
        return Work(tensors, self, [Message(to, works)])

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Work:
        """Start receiving, in one thread a peer, so that receives from it stay in order and this returns at once."""
        if source not in self._receivers:
            self._receivers[source] = concurrent.futures.ThreadPoolExecutor(1, "multicard-receive")
        _, where = sites()
        received = self._receivers[source].submit(self._receive, tensors, source, tag, where)
        return Work(tensors, self, [Message(source, [received])])

    def _receive(self, tensors: Sequence[Tensor], source: int, tag: int, where: str) -> None:
        for x in tensors:
            header, expected = torch.empty(HEADER, dtype=torch.uint8), _header(x)
            self._gloo.recv([header], source, tag).wait()
            if not torch.equal(header, expected):
                peer, me = self.ranks[source], self.ranks[self.rank]
                text = f"rank {peer} sent {_text(header)} and rank {me} receives {_text(expected)} at {where}"
                raise MismatchError(text, rank=peer, collective="recv")
            self._gloo.recv([x], source, tag).wait()

    def recv_from_any(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        raise UnsupportedError("a receive from any rank can't be checked: name the source, or run without the check")

    def drive(self, messages: Sequence[Message]) -> None:
        """Wait until these messages have arrived."""
        for message in messages:
            message.finish()

    def progress(self) -> None:
        """Does nothing: gloo's threads move messages."""

    # ---- life

    def set_timeout(self, seconds: float) -> None:
        self._gloo._set_default_timeout(datetime.timedelta(seconds=seconds))

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.shutdown(wait=False, cancel_futures=True)
        self._gloo.shutdown()


def _options(options: Any, root: int | None = None, op: str = "") -> Any:
    if root is not None:
        options.rootRank = root
    if op:
        options.reduceOp = TORCH_OPS[op]
    return options


def _header(x: Tensor) -> Tensor:
    """A description of a message, as bytes."""
    return torch.frombuffer(bytearray(f"{x.numel()} × {x.dtype}".encode().ljust(HEADER, b"\0")), dtype=torch.uint8)


def _text(header: Tensor) -> str:
    return bytes(header.tolist()).rstrip(b"\0").decode(errors="replace")
