"""The "shm" process group: what ``torch.distributed`` calls, on top of a board and channels."""

# torch's stubs spell every way to call each method; C++ and Python use one each
# mypy: disable-error-code="override, assignment, misc, func-returns-value"

from __future__ import annotations

import datetime
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends import shm_reduce
from multicard.backends.shm_board import Board
from multicard.backends.shm_channel import Inbox, Outbox, Transfer
from multicard.backends.shm_segment import Invitation
from multicard.backends.shm_sync import Sync
from multicard.errors import ConfigError, MismatchError, MulticardError, RankError, UnsupportedError

CALLS = ("barrier", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather", "scatter",
         "all_to_all", "send", "recv")  # fmt: skip
CODES = {name: code for code, name in enumerate(CALLS)}
DTYPES = sorted({t for t in vars(torch).values() if isinstance(t, torch.dtype)}, key=str)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
OPS = tuple(shm_reduce.NAMES.values())
OP_CODES = {name: code for code, name in enumerate(OPS)}
COLLECTIVE_TAG = (1 << 63) - 1  # all_to_all's messages; a program's own tags are 32-bit

Args = ParamSpec("Args")
T = TypeVar("T")


def describe(call: Sequence[int]) -> str:
    """A collective's description in words; see :meth:`ShmProcessGroup._enter`."""
    code, dtype, numel, detail = call[:4]
    name = CALLS[code]
    if name == "barrier":
        return "barrier()"
    about = f"{name}({numel} × {DTYPES[dtype]}"
    if name in ("all_reduce", "reduce_scatter"):
        about += f", {OPS[detail]}"
    elif name in ("broadcast", "gather", "scatter", "send", "recv"):
        about += f", group rank {detail}"
    elif name == "reduce":
        about += f", {OPS[detail % len(OPS)]}, group rank {detail // len(OPS)}"
    return about + ")"


class ShmWork(dist.Work):
    """An operation's handle. Collectives are complete when they return; messages, when ``wait`` returns."""

    def __init__(
        self, group: ShmProcessGroup | None = None, transfers: Sequence[Transfer] = (), tensors: Sequence[Any] = (),
        finish: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._group, self._transfers, self._tensors, self._finish = group, transfers, tensors, finish

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if self._group is not None:
            self._group._drive(self._transfers)
            if self._finish is not None:
                self._finish()
            self._group, self._finish = None, None
        return True

    def is_completed(self) -> bool:
        if self._group is not None:
            self._group._progress()
            if all(transfer.complete for transfer in self._transfers):
                self.wait()
        return self._group is None

    def is_success(self) -> bool:
        return self.is_completed()

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return self._transfers[0].peer

    _source_rank = source_rank

    def result(self) -> list[Tensor]:
        self.wait()
        return list(self._tensors)

    def get_future(self) -> torch.futures.Future:
        """Complete already: nothing moves messages along behind a program's back, so this waits."""
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._tensors)
        return future


class _Pending(threading.local):
    """Groups in which this thread has messages under way: whoever waits moves them along, in whatever group.

    A process is one party to all of its groups, so this is the process's; it holds no settings and nothing survives in
    it once the messages have arrived.
    """

    def __init__(self) -> None:
        self.groups: weakref.WeakSet[ShmProcessGroup] = weakref.WeakSet()


_pending = _Pending()


def _progress_all() -> None:
    for group in tuple(_pending.groups):
        group._progress()


def _guarded(call: Callable[Args, T]) -> Callable[Args, T]:
    """Whatever stops a call half way (Ctrl-C too) ends this rank's part in the group, and tells the others so."""

    @functools.wraps(call)
    def guarded(*args: Args.args, **kwargs: Args.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except MulticardError:
            raise
        except BaseException as error:
            group: Any = args[0]
            if group._sync is not None:
                group._sync.leave(f"was stopped by {type(error).__name__} in {call.__name__}")
            raise

    return guarded


class ShmProcessGroup(dist.ProcessGroup):
    """CPU ranks of one host that talk through shared memory.

    Collectives add contributions in rank order (half types in float32), so all ranks hold the same bits. They return
    when they are complete, ``async_op`` or not, but for send, recv and all_to_all, which go on while the program
    computes. A group is used by one thread at a time.

    Raises, from every operation:
        RankError: a peer died or gave up; CollectiveTimeout: one did not come in time; MismatchError: ranks are in
            different calls. The group is unusable from then on, on every rank.
        UnsupportedError: refused before anything was said to the peers; the group is as it was.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, ranks: Sequence[int] | None = None
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size, self._timeout = rank, size, timeout.total_seconds()
        self._ranks = tuple(ranks or range(size))
        self._group_name = self._group_desc = ""
        self._invitation = Invitation(store, rank, self._ranks) if size > 1 else None
        self._sync: Sync | None = None
        self._coalesced: list[ShmWork] | None = None

    # ---- attaching

    def _attach(self) -> None:
        """Map the group's memory. Runs once, before the first operation."""
        if self._invitation is None:
            raise RankError("this process group is shut down", rank=self._ranks[self._rank])
        segment, peers = self._invitation.accept(self._timeout)
        sync = Sync(segment, self._rank, peers, self._ranks, self._timeout, _progress_all, describe)
        others = [r for r in range(self._size) if r != self._rank]
        self._outboxes = {r: Outbox(segment, self._rank, r, sync.fence) for r in others}
        self._inboxes = {r: Inbox(segment, self._rank, r, sync.fence, self._wrong_size) for r in others}
        self._board = Board(segment, sync)
        self._sync = sync

    def _enter(
        self, name: str, tensor: Tensor | None = None, detail: int = 0, numel: int | None = None
    ) -> Board | None:
        """Begin a call: None where this rank is the whole group.

        What ranks compare is (call, dtype, elements, reduction or root), which they all must give alike.
        """
        if self._size == 1:
            return None
        if self._sync is None:
            self._attach()
        assert self._sync is not None
        dtype = 0 if tensor is None else DTYPE_CODES[tensor.dtype]
        if numel is None:
            numel = 0 if tensor is None else tensor.numel()
        self._sync.enter(CODES[name], dtype, numel, detail)
        return self._board

    # ---- collectives

    @_guarded
    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> ShmWork:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        op = "sum" if opts is None else shm_reduce.op_name(getattr(opts, "reduceOp", opts))
        for x in tensors:
            self.all_reduce(x, op)
        return ShmWork(tensors=tensors)

    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        """Combine everybody's ``x`` in place; ``op`` is one of sum, avg, product, min, max, band, bor, bxor."""
        _check(x)
        shm_reduce.check(op, x.dtype)
        board = self._enter("all_reduce", x, OP_CODES[op])
        if board is not None:
            board.all_reduce(x, op)

    allreduce_coalesced = allreduce

    @_guarded
    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> ShmWork:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        root = opts if isinstance(opts, int) else opts.rootRank
        for x in tensors:
            _check(x)
            board = self._enter("broadcast", x, root)
            if board is not None:
                with _Flat(x, write=self._rank != root) as flat:
                    board.broadcast(flat, root)
        return ShmWork(tensors=tensors)

    @_guarded
    def allgather(self, outs: Any, inputs: Any, opts: Any = None) -> ShmWork:
        if isinstance(inputs, Tensor):
            outs, inputs = [outs], [inputs]
        for parts, x in zip(outs, inputs, strict=True):
            self.all_gather(parts, x)
        return ShmWork(tensors=outs)

    allgather_coalesced = allgather

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        """Everybody's ``x`` into ``outs`` by rank; sizes may differ."""
        _check(x, *outs)
        if len(outs) != self._size or outs[self._rank].numel() != x.numel():
            raise ConfigError(
                f"all_gather of {x.numel()} elements into {[o.numel() for o in outs]} on rank {self._rank}"
            )
        sizes = tuple(out.numel() for out in outs)
        board = self._enter("all_gather", x, hash(sizes) & 0xFFFFFF, sum(sizes))
        if board is None:
            outs[0].copy_(x)
            return
        flats = [_Flat(out) for out in outs]
        board.all_gather([flat.flat for flat in flats], x.contiguous().view(-1))
        for flat in flats:
            flat.finish()

    @_guarded
    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> ShmWork:
        _check(out, x)
        if out.numel() != x.numel() * self._size:
            raise ConfigError(f"all_gather: {self._size} × {x.numel()} elements don't fill an output of {out.numel()}")
        with _Flat(out) as flat:
            self.all_gather(flat.view(self._size, -1).unbind(), x)
        return ShmWork(tensors=(out,))

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> ShmWork:
        for out, x in zip(outs, inputs, strict=True):
            self.all_gather_single(out, x)
        return ShmWork(tensors=outs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @_guarded
    def reduce_scatter(self, outs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> ShmWork:
        if isinstance(outs, Tensor):
            outs, inputs = [outs], [inputs]
        op = "sum" if opts is None else shm_reduce.op_name(getattr(opts, "reduceOp", opts))
        for out, parts in zip(outs, inputs, strict=True):
            self._reduce_scatter(out, parts, op)
        return ShmWork(tensors=outs)

    def _reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: str) -> None:
        _check(out, *parts)
        shm_reduce.check(op, out.dtype)
        if len(parts) != self._size or parts[self._rank].numel() != out.numel():
            raise ConfigError(
                f"reduce_scatter of {[p.numel() for p in parts]} elements into {out.numel()} on rank {self._rank}"
            )
        sizes = tuple(part.numel() for part in parts)
        board = self._enter("reduce_scatter", out, OP_CODES[op], hash(sizes) & 0xFFFFFFFF)
        if board is None:
            out.copy_(parts[0])
            return
        with _Flat(out) as flat:
            board.reduce_scatter(flat, [part.contiguous().view(-1) for part in parts], op)

    @_guarded
    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> ShmWork:
        op = "sum" if opts is None else shm_reduce.op_name(opts.reduceOp)
        if x.numel() != out.numel() * self._size:
            raise ConfigError(f"reduce_scatter: {x.numel()} elements are not {self._size} × {out.numel()}")
        self._reduce_scatter(out, x.contiguous().view(self._size, -1).unbind(), op)
        return ShmWork(tensors=(out,))

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> ShmWork:
        for out, x in zip(outs, inputs, strict=True):
            self.reduce_scatter_single(out, x, opts)
        return ShmWork(tensors=outs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @_guarded
    def reduce(self, tensors: Any, opts: Any, *rest: Any) -> ShmWork:
        root, op = opts.rootRank, shm_reduce.op_name(opts.reduceOp)
        for x in tensors:
            _check(x)
            shm_reduce.check(op, x.dtype)
            board = self._enter("reduce", x, root * len(OPS) + OP_CODES[op])
            if board is None:
                continue
            with _Flat(x, write=self._rank == root) as flat:
                board.collect(flat, root, lambda at, parts, flat=flat: shm_reduce.reduce_into(flat[at], parts, op))
        return ShmWork(tensors=tensors)

    @_guarded
    def gather(self, outs: Any, inputs: Any, opts: Any, *rest: Any) -> ShmWork:
        root = opts.rootRank
        for i, x in enumerate(inputs):
            parts = outs[i] if self._rank == root else []
            _check(x, *parts)
            if self._rank == root and [p.numel() for p in parts] != [x.numel()] * self._size:
                raise ConfigError(f"gather of {x.numel()} elements from each rank into {[p.numel() for p in parts]}")
            board = self._enter("gather", x, root)
            if board is None:
                parts[0].copy_(x)
                continue
            flats = [_Flat(part) for part in parts]

            def keep(at: slice, pieces: list[Tensor], flats: list[_Flat] = flats) -> None:
                for flat, piece in zip(flats, pieces, strict=True):
                    flat.flat[at].copy_(piece)

            board.collect(x.contiguous().view(-1), root, keep)
            for flat in flats:
                flat.finish()
        return ShmWork(tensors=outs)

    @_guarded
    def scatter(self, outs: Any, inputs: Any, opts: Any, *rest: Any) -> ShmWork:
        root = opts.rootRank
        for i, out in enumerate(outs):
            parts = inputs[i] if self._rank == root else []
            _check(out, *parts)
            if self._rank == root and [p.numel() for p in parts] != [out.numel()] * self._size:
                raise ConfigError(f"scatter of {[p.numel() for p in parts]} elements into {out.numel()} on each rank")
            board = self._enter("scatter", out, root)
            if board is None:
                out.copy_(parts[0])
                continue
            with _Flat(out) as flat:
                board.scatter(flat, [part.contiguous().view(-1) for part in parts], root)
        return ShmWork(tensors=outs)

    @_guarded
    def barrier(self, opts: Any = None, timeout: Any = None) -> ShmWork:
        board = self._enter("barrier")
        if board is not None:
            board.barrier()
        return ShmWork()

    # ---- point to point

    @_guarded
    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> ShmWork:
        return self._messages("send", tensors, to, tag)

    @_guarded
    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> ShmWork:
        return self._messages("recv", tensors, source, tag)

    def _messages(self, name: str, tensors: Sequence[Tensor], peer: int, tag: int) -> ShmWork:
        _check(*tensors)
        if peer == self._rank or not 0 <= peer < self._size:
            raise UnsupportedError(f"{name}: group rank {self._rank} of {self._size} can't {name} with rank {peer}")
        for x in tensors:
            self._enter(name, x, peer)
        flats = [_Flat(x) for x in tensors]
        transfers = [Transfer(peer, _bytes(flat.flat), tag) for flat in flats]
        for transfer in transfers:
            self._post(transfer, sends=name == "send")
        self._progress()
        finish = (
            None if name == "send" or all(x.is_contiguous() for x in tensors) else lambda: [f.finish() for f in flats]
        )
        work = ShmWork(self, transfers, tensors, finish)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> ShmWork:
        """Receive from whoever sends first. Waits for that rank's message to start."""
        _check(*tensors)
        self._enter("recv", tensors[0], self._rank)
        assert self._sync is not None
        found: list[int] = []

        def missing() -> list[int]:
            found.extend(r for r, inbox in self._inboxes.items() if inbox.waiting(tag))
            return [] if found else list(self._inboxes)

        self._sync.wait(missing)
        return self.recv(tensors, found[0], tag)

    @_guarded
    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> ShmWork:
        _check(out, x)
        flat = _Flat(out)
        ins, outs = _split(x.contiguous(), in_splits, self._size), _split(flat.tensor, out_splits, self._size)
        return self._all_to_all(outs, ins, (out,), flat.finish)

    alltoall_base = all_to_all_single

    @_guarded
    def alltoall(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> ShmWork:
        _check(*outs, *inputs)
        if len(outs) != self._size or len(inputs) != self._size:
            raise ConfigError(f"all_to_all needs {self._size} tensors each way, not {len(inputs)} and {len(outs)}")
        flats = [_Flat(out) for out in outs]
        ins = [x.contiguous().view(-1) for x in inputs]
        return self._all_to_all([flat.flat for flat in flats], ins, outs, lambda: [flat.finish() for flat in flats])

    def _all_to_all(
        self, outs: Sequence[Tensor], ins: Sequence[Tensor], tensors: Sequence[Tensor], finish: Callable[[], object]
    ) -> ShmWork:
        own, rank = outs[self._rank], self._rank
        if own.numel() != ins[rank].numel():
            raise ConfigError(
                f"all_to_all: rank {rank} sends itself {ins[rank].numel()} elements and takes {own.numel()}"
            )
        self._enter("all_to_all", own, numel=0)
        transfers = []
        for peer in (r for d in range(1, self._size) for r in ((rank + d) % self._size,)):
            for x, sends in ((ins[peer], True), (outs[peer], False)):
                transfers.append(Transfer(peer, _bytes(x), COLLECTIVE_TAG))
                self._post(transfers[-1], sends)
        if own.numel():
            own.copy_(ins[rank])
        if self._size > 1:
            self._progress()
        return ShmWork(self, transfers, tensors, finish)

    def _post(self, transfer: Transfer, sends: bool) -> None:
        if sends:
            self._outboxes[transfer.peer].queue.append(transfer)
        else:
            self._inboxes[transfer.peer].post(transfer)
        _pending.groups.add(self)

    def _progress(self) -> None:
        if self._sync is None or self._sync.error is not None:
            return
        busy = False
        for outbox in self._outboxes.values():
            if outbox.queue:
                outbox.progress()
                busy = busy or bool(outbox.queue)
        for inbox in self._inboxes.values():
            if inbox.queue:
                inbox.progress()
                busy = busy or bool(inbox.queue)
        if not busy:
            _pending.groups.discard(self)

    @_guarded
    def _drive(self, transfers: Sequence[Transfer]) -> None:
        """Wait until these have arrived."""
        if self._sync is None:
            return
        if self._sync.error is not None and not all(t.complete for t in transfers):
            raise self._sync.again()
        for _ in range(20):
            if all(t.complete for t in transfers):
                return
            self._progress()
        self._sync.wait(lambda: sorted({t.peer for t in transfers if not t.complete}))

    def _wrong_size(self, peer: int, sent: int, expected: int) -> None:
        assert self._sync is not None
        what = f"rank {self._ranks[peer]} sends {sent} bytes where {expected} are expected"
        raise self._sync.fail(self._sync.make_error(MismatchError, peer, what))

    # ---- what torch.distributed asks of a group

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> ShmWork:
        works, self._coalesced = self._coalesced or [], None
        return ShmWork(
            self, [t for work in works for t in work._transfers], (), lambda: [work.wait() for work in works]
        )

    supports_coalescing = False

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._timeout = timeout.total_seconds()
        if self._sync is not None:
            self._sync.timeout = self._timeout

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leave the group: a peer that still waits for this rank gets an error at once."""
        if self._sync is not None:
            self._sync.leave("left the group")
            self._sync = None
            del self._board, self._outboxes, self._inboxes
        if self._invitation is not None:
            self._invitation.withdraw()
            self._invitation = None

    def abort(self) -> None:
        self.shutdown()

    def _get_backend(self, device: torch.device) -> ShmProcessGroup:
        if device.type != "cpu":
            raise UnsupportedError(f"backend shm is for CPU tensors, not {device}")
        return self

    def getBackendName(self) -> str:  # noqa: N802
        return "shm"

    def name(self) -> str:
        return "shm"

    def getRank(self) -> int:  # noqa: N802
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        return self._size

    rank, size = getRank, getSize

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._group_name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._group_name

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._group_desc = desc

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._group_desc

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name, group_desc = property(getGroupName), property(getGroupDesc)


class _Flat:
    """A tensor as one dimension; where that takes a copy, ``finish`` writes it back."""

    def __init__(self, tensor: Tensor, write: bool = True) -> None:
        self._origin, self.tensor, self._write = tensor, tensor.contiguous(), write
        self.flat = self.tensor.view(-1)

    def finish(self) -> None:
        if self._write and self.tensor is not self._origin:
            self._origin.copy_(self.tensor)

    def __enter__(self) -> Tensor:
        return self.flat

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        if not x.is_cpu or x.layout != torch.strided:
            raise UnsupportedError(
                f"backend shm is for dense CPU tensors, not {x.layout} on {x.device}: give such tensors "
                "a group of their own device's backend"
            )


def _split(x: Tensor, sizes: Sequence[int], parts: int) -> list[Tensor]:
    """Rows by rank, flat."""
    rows = x.shape[0]
    sizes = list(sizes) or [rows // parts] * parts
    if sum(sizes) != rows or len(sizes) != parts:
        raise ConfigError(f"all_to_all: splits {sizes} over {parts} ranks don't make {rows} rows")
    return [part.view(-1) for part in x.split(sizes)]
