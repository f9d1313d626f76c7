"""A group of ranks that share memory: collectives and messages on tensors, without ``torch.distributed``'s wrapping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends import calls, reductions
from multicard.backends.shm.channel import Transfer
from multicard.backends.shm.messages import COLLECTIVE_TAG, Mail, progress_all
from multicard.backends.shm.segment import WINDOW, Invitation
from multicard.backends.shm.sync import Sync
from multicard.backends.shm.tensor import Flat, Flats, about, check, check_writable, flatten, plain
from multicard.backends.shm.window import Board
from multicard.backends.shm.work import ShmWork
from multicard.errors import ConfigError, MismatchError, MulticardError, RankError, UnsupportedError

Args = ParamSpec("Args")
T = TypeVar("T")


def _guarded(call: Callable[Concatenate[Group, Args], T]) -> Callable[Concatenate[Group, Args], T]:
    """Whatever stops a call half way (Ctrl-C too) ends this rank's part in the group, and tells the others so."""

    @functools.wraps(call)
    def guarded(self: Group, *args: Args.args, **kwargs: Args.kwargs) -> T:
        try:
            return call(self, *args, **kwargs)
        except MulticardError:
            raise
        except BaseException as error:
            if self.sync is not None:
                self.sync.leave(f"was stopped by {type(error).__name__} in {call.__name__}")
            raise

    return guarded


class Group:
    """One rank's end of a group.

    Contributions are added in rank order (half types in float32), so all ranks hold the same bits. Tensors are dense,
    on the CPU, of any dtype and strides. Collectives return when they are complete; sends, receives and all-to-alls go
    on whenever the program waits for anything. A group is used by one thread at a time.

    Every operation may raise
        RankError: a peer died or gave up; CollectiveTimeout: one did not come in time; MismatchError: ranks are in
            different calls. The group is unusable from then on, on every rank.
        UnsupportedError, ConfigError: refused before anything was said to the peers; the group is as it was.

    Args:
        store: where the group's ranks find one another.
        rank: this one's rank within the group.
        ranks: every rank's global rank, for messages.
        timeout: seconds that one wait may last.
        checked: also compare where collectives are called from, and let all ranks agree before any data moves.
    """

    def __init__(
        self, store: dist.Store, rank: int, ranks: Sequence[int], timeout: float, *, checked: bool = False
    ) -> None:
        self.rank, self.size, self.ranks = rank, len(ranks), tuple(ranks)
        self.timeout, self.checked = timeout, checked
        self.sync: Sync | None = None
        self._invitation: Invitation | None = Invitation(store, rank, self.ranks) if self.size > 1 else None
        self._closed = False

    def _attach(self) -> Sync:
        """Map the group's memory. Runs once, before the first operation."""
        if self._closed or self._invitation is None:
            raise self.again()
        with torch.inference_mode(False):  # the views made here outlive whatever mode their first user is in
            segment, peers = self._invitation.accept(self.timeout)
            sync = Sync(segment, self.rank, peers, self.ranks, self.timeout, progress_all)
            self._mail = Mail(segment, sync)
            self._board = Board(segment, sync)
        self.sync = sync
        return sync

    def _enter(self, name: str, x: Tensor | None = None, numel: int = 0, detail: int = 0) -> Board:
        """Begin a collective; ``numel`` and ``detail`` (reduction, root, sizes) are the same on all ranks."""
        sync = self.sync or self._attach()
        dtype = 0 if x is None else calls.DTYPE_CODES[x.dtype]
        sync.enter(calls.CODES[name], dtype, numel, detail)
        if self.checked:
            site, line = calls.sites() if name in calls.SYMMETRIC else (0, "")
            if x is not None and name in calls.SAME_SHAPE:
                site, line = hash((site, *x.shape)), line and f"{line} with shape {tuple(x.shape)}"
            sync.agree(site, line)
        return self._board

    # ---- collectives

    @_guarded
    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self._enter("barrier").barrier()

    @_guarded
    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        """Combine everybody's ``x`` in place; ``op`` is one of :data:`reductions.COMBINE`."""
        check(x)
        reductions.check(op, x.dtype)
        if self.size == 1:
            return
        board = self._enter("all_reduce", x, x.numel(), calls.OP_CODES[op])
        if x.requires_grad or not x.is_contiguous():
            with Flat(x) as flat:
                board.all_reduce(flat, op)
        else:
            board.all_reduce(x, op)

    @_guarded
    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        """Everybody's ``x`` into ``outs`` by rank; sizes may differ."""
        check(x, *outs)
        sizes = tuple(out.numel() for out in outs)
        if len(outs) != self.size or sizes[self.rank] != x.numel() or any(out.dtype != x.dtype for out in outs):
            raise ConfigError(
                f"all_gather: {about(x)} on rank {self.rank} doesn't fit outputs of {sizes}, {outs[0].dtype}"
            )
        check_writable(*outs)
        if self.size == 1:
            plain(outs[0]).copy_(plain(x).reshape(outs[0].shape))
            return
        board = self._enter("all_gather", x, sum(sizes), hash(sizes) & 0xFFFFFFFF)
        if max(sizes) * x.itemsize <= WINDOW:
            board.all_gather([plain(out) for out in outs], plain(x))
        else:
            with Flats(outs) as flats:
                board.all_gather_long(flats, flatten(x))

    @_guarded
    def all_gather_single(self, out: Tensor, x: Tensor) -> None:
        """Everybody's ``x``, of one size, one after the other into ``out``."""
        check(out, x)
        numel = x.numel()
        if out.numel() != numel * self.size or out.dtype != x.dtype:
            raise ConfigError(f"all_gather: {self.size} × {about(x)} doesn't fill an output of {about(out)}")
        if self.size > 1 and numel * x.itemsize <= WINDOW and out.is_contiguous():
            rows = plain(out).view(self.size, numel)
            self._enter("all_gather", x, out.numel(), numel).all_gather_rows(rows, plain(x))
        else:
            with Flat(out) as flat:
                self.all_gather(flat.view(self.size, numel).unbind(), x)

    @_guarded
    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: str = "sum") -> None:
        """``parts`` are contributions to every rank; ``out`` gets everybody's to this one. Sizes may differ by rank."""
        check(out, *parts)
        reductions.check(op, out.dtype)
        sizes = tuple(part.numel() for part in parts)
        if len(parts) != self.size or sizes[self.rank] != out.numel() or any(p.dtype != out.dtype for p in parts):
            raise ConfigError(f"reduce_scatter: parts of {sizes} don't fit {about(out)} on rank {self.rank}")
        with Flat(out) as flat:
            if self.size == 1:
                flat.copy_(flatten(parts[0]))
                return
            detail = (hash(sizes) & 0xFFFFFFFF) * len(calls.OPS) + calls.OP_CODES[op]
            board = self._enter("reduce_scatter", out, sum(sizes), detail)
            board.reduce_scatter(flat, [flatten(part) for part in parts], op)

    @_guarded
    def broadcast(self, x: Tensor, root: int) -> None:
        """``root``'s ``x`` into everybody's."""
        check(x)
        self._check_root("broadcast", root)
        if self.size == 1:
            return
        if self.rank != root:
            check_writable(x)
        board = self._enter("broadcast", x, x.numel(), root)
        if x.numel() * x.itemsize <= WINDOW:
            board.broadcast(plain(x), root)
        else:
            with Flat(x, write=self.rank != root) as flat:
                for part in flat.split(WINDOW // x.itemsize):
                    board.broadcast(part, root)

    @_guarded
    def reduce(self, x: Tensor, root: int, op: str = "sum") -> None:
        """Combine everybody's ``x`` into ``root``'s."""
        check(x)
        reductions.check(op, x.dtype)
        self._check_root("reduce", root)
        if self.size > 1:
            with Flat(x, write=self.rank == root) as flat:
                board = self._enter("reduce", x, x.numel(), root * len(calls.OPS) + calls.OP_CODES[op])
                board.collect(flat, root, lambda at, parts: reductions.reduce_into(flat[at], parts, op))

    @_guarded
    def gather(self, outs: Sequence[Tensor], x: Tensor, root: int) -> None:
        """Everybody's ``x``, of one size, into ``root``'s ``outs`` by rank; the others give no ``outs``."""
        check(x, *outs)
        self._check_root("gather", root)
        self._check_parts("gather", x, outs, root)
        with Flats(outs) as flats:
            if self.size == 1:
                flats[0].copy_(flatten(x))
                return

            def keep(at: slice, pieces: Sequence[Tensor]) -> None:
                for flat, piece in zip(flats, pieces, strict=True):
                    flat[at].copy_(piece)

            self._enter("gather", x, x.numel(), root).collect(flatten(x), root, keep)

    @_guarded
    def scatter(self, out: Tensor, parts: Sequence[Tensor], root: int) -> None:
        """``root``'s ``parts`` by rank, of one size, into everybody's ``out``; the others give no ``parts``."""
        check(out, *parts)
        self._check_root("scatter", root)
        self._check_parts("scatter", out, parts, root)
        with Flat(out) as flat:
            if self.size == 1:
                flat.copy_(flatten(parts[0]))
            else:
                board = self._enter("scatter", out, out.numel(), root)
                board.scatter(flat, [flatten(part) for part in parts], root)

    def _check_root(self, name: str, root: int) -> None:
        if not 0 <= root < self.size:
            raise ConfigError(f"{name}: group rank {root} is outside this group of {self.size}")

    def _check_parts(self, name: str, x: Tensor, parts: Sequence[Tensor], root: int) -> None:
        if self.rank == root and (
            [p.numel() for p in parts] != [x.numel()] * self.size or any(p.dtype != x.dtype for p in parts)
        ):
            raise ConfigError(f"{name}: {about(x)} a rank, but {len(parts)} parts of {[p.numel() for p in parts]}")

    # ---- messages

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> ShmWork:
        """Start sending. The tensors may change once the work is waited for."""
        return self.exchange(tensors, to, (), 0, tag)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> ShmWork:
        """Start receiving. The tensors hold what came once the work is waited for."""
        return self.exchange((), 0, tensors, source, tag)

    @_guarded
    def exchange(
        self, sends: Sequence[Tensor], to: int, receives: Sequence[Tensor], source: int, tag: int = 0
    ) -> ShmWork:
        """Start sending to one rank and receiving from one, the same or another."""
        check(*sends, *receives)
        for peer, tensors in ((to, sends), (source, receives)):
            if tensors and (peer == self.rank or not 0 <= peer < self.size):
                raise UnsupportedError(f"group rank {self.rank} of {self.size} can't talk to group rank {peer}")
        if (self.sync or self._attach()).error is not None:
            raise self.again()
        transfers = [Transfer(to, x, tag) for x in sends]
        transfers += [Transfer(source, x, tag, receives=True) for x in receives]
        return ShmWork(receives or sends, self, self._mail.start(transfers))

    @_guarded
    def recv_from_any(self, tensors: Sequence[Tensor], tag: int = 0) -> ShmWork:
        """Receive from whichever rank sends first; waits until one does."""
        if self.sync is None:
            self._attach()
        return self.recv(tensors, self._mail.wait_for_any(tag), tag)

    @_guarded
    def all_to_all(self, outs: Sequence[Tensor], ins: Sequence[Tensor], tensors: Sequence[Tensor] = ()) -> ShmWork:
        """``ins`` by destination, ``outs`` by source; sizes may differ. A work's future gives ``tensors``.

        Waits until every rank has called; what doesn't fit a window goes on after that.
        """
        check(*outs, *ins)
        rank = self.rank
        if len(outs) != self.size or len(ins) != self.size or outs[rank].numel() != ins[rank].numel():
            raise ConfigError(
                f"all_to_all: rank {rank} of {self.size} sends {[x.numel() for x in ins]} elements by rank and takes "
                f"{[x.numel() for x in outs]}: as many as there are ranks, and as many to itself as from itself"
            )
        dtype = outs[0].dtype
        for x in (*outs, *ins):
            if x.dtype != dtype:
                raise ConfigError(f"all_to_all: all tensors must be {dtype}, not {x.dtype}")
        check_writable(*outs)
        ins, outs = [plain(x) for x in ins], [plain(out) for out in outs]
        own, source = outs[rank], ins[rank]
        if self.size == 1:
            own.copy_(source.reshape(own.shape))
            return ShmWork(tensors or outs)
        board = self._enter("all_to_all", own)
        if self.checked:
            self._compare_splits([x.numel() for x in ins], [x.numel() for x in outs])
        sends = self._mail.start([Transfer(r, ins[r], COLLECTIVE_TAG) for r in board.write_parts(ins)])
        return self._take_parts(board, outs, ins[rank], sends, tensors or outs)

    def _take_parts(
        self, board: Board, outs: Sequence[Tensor], own: Tensor, sends: list[Transfer], tensors: Sequence[Any]
    ) -> ShmWork:
        mine = outs[self.rank]
        mine.copy_(own if own.shape == mine.shape else own.reshape(mine.shape))
        receives = [Transfer(r, outs[r], COLLECTIVE_TAG, receives=True) for r in board.read_parts(outs)]
        return ShmWork(tensors, self, sends + self._mail.start(receives))

    @_guarded
    def all_to_all_single(
        self, out: Tensor, x: Tensor, receive: Sequence[int] = (), send: Sequence[int] = ()
    ) -> ShmWork:
        """Slices of ``x`` along dim 0, ``send`` rows each, by rank; they arrive in rank order, ``receive`` rows each.

        Neither given: equal ones.
        """
        check(out, x)
        size = self.size
        even = len({*send, *receive}) <= 1 and len(send) in (0, size) and len(receive) in (0, size)
        even = even and out.shape == x.shape and out.dtype == x.dtype and _fits(x, size) and _fits(out, size)
        if not even or self.checked or size == 1:
            return self.all_to_all(_rows(out, receive, size), _rows(x, send, size), (out,))
        out, x = plain(out), plain(x)
        board = self._enter("all_to_all", x)
        board.write_even_parts(x)
        if board.read_even_parts(out):
            return ShmWork((out,))
        outs = _rows(out, receive, size)
        return self._take_parts(board, outs, _rows(x, send, size)[self.rank], [], (out,))

    def _compare_splits(self, sent: Sequence[int], received: Sequence[int]) -> None:
        """What rank i sends to j must be what j takes from i."""
        assert self.sync is not None
        splits = torch.empty(self.size, 2, self.size, dtype=torch.int64)
        self._board.all_gather(splits.unbind(), torch.tensor([sent, received]))
        wrong = (splits[:, 0] != splits[:, 1].t()).nonzero().tolist()
        if wrong:
            source, to = wrong[0]
            told = f"rank {self.ranks[source]} sends {splits[source, 0, to]} elements to rank {self.ranks[to]}, which "
            told += f"takes {splits[to, 1, source]}"
            raise self.sync.fail(self.sync.make_error(MismatchError, source, f"ranks disagree: {told}"))

    def progress(self) -> None:
        """Move messages along, as far as that goes without waiting."""
        if self.sync is not None:
            self._mail.progress()

    @_guarded
    def drive(self, transfers: Sequence[Transfer]) -> None:
        """Wait until these messages have arrived."""
        if self.sync is not None:
            self._mail.drive(transfers)
        elif not all(transfer.complete for transfer in transfers):
            raise self.again()

    def again(self) -> RankError:
        """The error of a group that is shut down or has failed before."""
        if self.sync is not None:
            return self.sync.again()
        return RankError("this process group is shut down", rank=self.ranks[self.rank])

    # ---- life

    def set_timeout(self, seconds: float) -> None:
        self.timeout = seconds
        if self.sync is not None:
            self.sync.timeout = seconds

    def close(self) -> None:
        """Leave: a peer that still waits for this rank gets an error at once."""
        if self.sync is not None:
            self.sync.leave("left the group")
            self.sync = None
            del self._board, self._mail
        if self._invitation is not None:
            self._invitation.withdraw()
        self._closed = True


def _fits(x: Tensor, parts: int) -> bool:
    """Whether a tensor's rows divide, lie in order and fit a window."""
    return x.ndim > 0 and x.shape[0] % parts == 0 and x.numel() * x.itemsize <= WINDOW and x.is_contiguous()


def _rows(x: Tensor, sizes: Sequence[int], parts: int) -> Sequence[Tensor]:
    """Slices by rank along dim 0; no sizes given: equal ones."""
    sizes = list(sizes) or [x.shape[0] // parts] * parts
    if sum(sizes) != x.shape[0] or len(sizes) != parts:
        raise ConfigError(f"all_to_all: slices of {sizes} over {parts} ranks don't make {x.shape[0]} rows")
    return x.split_with_sizes(sizes)
