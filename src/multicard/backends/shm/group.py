"""A group of ranks that share memory: collectives and messages on tensors, without ``torch.distributed``'s wrapping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends import reductions
from multicard.backends.agreement import Agreement
from multicard.backends.calls import size_code, to_call
from multicard.backends.shm.channel import Transfer
from multicard.backends.shm.messages import Messages, progress_all
from multicard.backends.shm.parts import Parts
from multicard.backends.shm.segment import WINDOW, Handshake
from multicard.backends.shm.sync import Sync, guarded
from multicard.backends.shm.tensor import Flat, about, check, check_writable, flatten, plain
from multicard.backends.shm.window import Windows
from multicard.backends.work import Work
from multicard.errors import ConfigError, RankError, UnsupportedError


class Group:
    """One rank's end of a group.

    Contributions are added in rank order (half types in float32), so all ranks hold the same bits. Tensors are dense,
    on the CPU, of any dtype and strides. Collectives return when they are complete; sends, receives and all-to-alls
    continue whenever the program waits for anything. A group may be used by one thread at a time.

    Every operation may raise
        RankError: a peer died or failed; CollectiveTimeout: one did not arrive in time; MismatchError: ranks are in
            different calls. The group is unusable from then on, on every rank.
        UnsupportedError, ConfigError: refused before any communication; the group stays usable.

    Args:
        store: in which the group's ranks find one another.
        rank: this process's rank within the group.
        ranks: every rank's global rank, for messages.
        timeout: seconds that one wait may last.
        checked: check collectives: compare all ranks' calls and call sites before any data moves.
    """

    def __init__(
        self, store: dist.Store, rank: int, ranks: Sequence[int], timeout: float, *, checked: bool = False
    ) -> None:
        self.rank, self.size, self.ranks = rank, len(ranks), tuple(ranks)
        self.timeout, self.checked = timeout, checked
        self.agreement = Agreement(self.ranks)
        self.sync: Sync | None = None
        self._handshake = Handshake(store, rank, self.ranks)
        self._closed = False

    @property
    def calls(self) -> int:
        """How many collectives this rank has entered."""
        return self.sync.calls if self.sync is not None else 0

    def _attach(self) -> Sync:
        """Map the group's memory. Runs once, before the first operation."""
        if self._closed:
            raise RankError("this process group is shut down", rank=self.ranks[self.rank])
        with torch.inference_mode(False):  # the views made here are also used outside an inference mode
            segment, peers = self._handshake.complete(self.timeout)
            sync = Sync(segment, self.rank, peers, self.ranks, self.timeout, progress_all)
            self._messages = Messages(segment, sync)
            self._windows = Windows(segment, sync)
            self._parts = Parts(self._windows, self._messages, sync)
        self.sync = sync
        return sync

    def _enter(
        self,
        name: str,
        x: Tensor | None = None,
        numel: int = 0,
        detail: int = 0,
        op: str = "sum",
        splits: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> Windows:
        """Begin a collective; ``numel``, ``detail`` (root or :func:`size_code`) and ``op`` are equal on all ranks."""
        sync = self.sync or self._attach()
        call = to_call(name, x, numel, detail, op)
        sync.enter(call)
        if self.checked:
            with sync.compare():
                error = self.agreement.find_mismatch(self._windows.all_gather, sync.calls, call, x, *splits)
            if error is not None:
                raise sync.fail(error)
        return self._windows

    # ---- collectives

    @guarded
    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self._enter("barrier").barrier()

    @guarded
    def all_reduce(self, x: Tensor, op: str = "sum") -> None:
        """Combine all ranks' ``x`` in place; ``op`` is one of :data:`reductions.COMBINE`."""
        check(x)
        reductions.check(op, x.dtype)
        if x.requires_grad or not x.is_contiguous():
            with Flat(x) as flat:
                self._enter("all_reduce", x, x.numel(), 0, op).all_reduce(flat, op)
        else:
            self._enter("all_reduce", x, x.numel(), 0, op).all_reduce(x, op)

    @guarded
    def reduce(self, x: Tensor, root: int, op: str = "sum") -> None:
        """Combine all ranks' ``x`` into ``root``'s."""
        self._check_root("reduce", root)
        check(x)
        reductions.check(op, x.dtype)
        with Flat(x, write=self.rank == root) as flat:
            self._enter("reduce", x, x.numel(), root, op).reduce(flat, op, reads=self.rank == root)

    @guarded
    def broadcast(self, x: Tensor, root: int) -> None:
        """``root``'s ``x`` into all ranks' ``x``."""
        self._check_root("broadcast", root)
        check(x)
        if self.rank != root:
            check_writable(x)
        self._enter("broadcast", x, x.numel(), root).broadcast(plain(x), root)

    @guarded
    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        """All ranks' ``x`` into ``outs`` by rank; sizes may differ."""
        sizes = self._check_parts("all_gather", x, outs)
        check_writable(*outs)
        windows = self._enter("all_gather", x, sum(sizes), size_code(sizes))
        windows.all_gather([plain(out) for out in outs], plain(x), max(sizes))

    @guarded
    def all_gather_single(self, out: Tensor, x: Tensor) -> None:
        """All ranks' ``x``, of one size, concatenated into ``out``."""
        check(out, x)
        numel = x.numel()
        if out.numel() != numel * self.size or out.dtype != x.dtype:
            raise ConfigError(f"all_gather: {self.size} × {about(x)} doesn't fill an output of {about(out)}")
        if numel * x.itemsize <= WINDOW and out.is_contiguous():
            rows = plain(out).view(self.size, numel)
            self._enter("all_gather", x, out.numel(), numel).all_gather(rows, plain(x))
        else:
            with Flat(out) as flat:
                self.all_gather(flat.view(self.size, numel).unbind(), x)

    @guarded
    def gather(self, outs: Sequence[Tensor], x: Tensor, root: int) -> None:
        """All ranks' ``x``, of one size, into ``root``'s ``outs`` by rank; the others give no ``outs``."""
        self._check_root("gather", root)
        check(x)
        outs = outs if self.rank == root else ()
        if self.rank == root:
            self._check_parts("gather", x, outs, even=True)
            check_writable(*outs)
        windows = self._enter("gather", x, x.numel(), root)
        windows.all_gather([plain(out) for out in outs], plain(x), x.numel())

    @guarded
    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: str = "sum") -> None:
        """``parts`` are contributions by rank; ``out`` gets all ranks' to this one, combined. Sizes may differ."""
        sizes = self._check_parts("reduce_scatter", out, parts)
        reductions.check(op, out.dtype)
        with Flat(out) as flat:
            windows = self._enter("reduce_scatter", out, sum(sizes), size_code(sizes), op)
            windows.reduce_scatter(flat, [flatten(part) for part in parts], op)

    @guarded
    def scatter(self, out: Tensor, parts: Sequence[Tensor], root: int) -> None:
        """``root``'s ``parts`` by rank, of one size, into all ranks' ``out``; the others give no ``parts``.

        An all-to-all in which the others send nothing.
        """
        self._check_root("scatter", root)
        check(out)
        check_writable(out)
        outs, ins = ([out.new_empty(0)] * self.size for _ in range(2))
        outs[root] = plain(out)
        if self.rank == root:
            self._check_parts("scatter", out, parts, even=True)
            ins = [plain(part) for part in parts]
        self._enter("scatter", out, out.numel(), root)
        Work((), self._messages, self._parts.swap(outs, ins)).wait()

    @guarded
    def all_to_all(self, outs: Sequence[Tensor], ins: Sequence[Tensor], tensors: Sequence[Tensor] = ()) -> Work:
        """``ins`` by destination, ``outs`` by source; sizes may differ. A work's future gives ``tensors``.

        Waits until every rank has called; parts that don't fit a window continue after that.
        """
        check(*outs, *ins)
        sent, received, dtypes = [x.numel() for x in ins], [x.numel() for x in outs], {x.dtype for x in (*outs, *ins)}
        whole = len(outs) == len(ins) == self.size and len(dtypes) == 1
        if not whole or sent[self.rank] != received[self.rank]:
            raise ConfigError(
                f"all_to_all: rank {self.rank} of {self.size} sends {sent} elements by rank and takes {received}, of "
                f"{dtypes}: give a tensor for each rank, all of one dtype, and send as much to itself as it takes"
            )
        check_writable(*outs)
        self._enter("all_to_all", outs[0], splits=(sent, received))
        under_way = self._parts.swap([plain(out) for out in outs], [plain(x) for x in ins])
        return Work(tensors or outs, self._messages, under_way)

    @guarded
    def all_to_all_single(self, out: Tensor, x: Tensor, receive: Sequence[int] = (), send: Sequence[int] = ()) -> Work:
        """Slices of ``x`` along dim 0, ``send`` rows each, by rank; they arrive in rank order, ``receive`` rows each.

        If neither is given, slices are equal.
        """
        check(out, x)
        size = self.size
        even = len({*send, *receive}) <= 1 and len(send) in (0, size) and len(receive) in (0, size)
        even = even and out.shape == x.shape and out.dtype == x.dtype and _fits(x, size) and _fits(out, size)
        if not even:
            return self.all_to_all(_rows(out, receive, size), _rows(x, send, size), (out,))
        counts = [x.numel() // size] * size
        self._enter("all_to_all", x, splits=(counts, counts))
        return Work((out,), self._messages, self._parts.swap_even(plain(out), plain(x)))

    def _check_root(self, name: str, root: int) -> None:
        if not 0 <= root < self.size:
            raise ConfigError(f"{name}: group rank {root} is outside this group of {self.size}")

    def _check_parts(self, name: str, x: Tensor, parts: Sequence[Tensor], even: bool = False) -> list[int]:
        """One part for each rank, of ``x``'s dtype, this rank's (``even``: every one) of its size. Gives the sizes."""
        check(x, *parts)
        sizes, dtypes = [part.numel() for part in parts], {part.dtype for part in parts}
        fit = len(parts) == self.size and sizes[self.rank] == x.numel() and dtypes == {x.dtype}
        if not fit or (even and min(sizes) != max(sizes)):
            raise ConfigError(f"{name}: {about(x)} on rank {self.rank} doesn't fit parts of {sizes}, {dtypes}")
        return sizes

    # ---- point-to-point messages

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> Work:
        """Start sending. The tensors may be changed once ``wait`` of the work has returned."""
        return self.exchange(tensors, to, (), 0, tag)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Work:
        """Start receiving. The tensors have been received once ``wait`` of the work has returned."""
        return self.exchange((), 0, tensors, source, tag)

    @guarded
    def exchange(self, sends: Sequence[Tensor], to: int, receives: Sequence[Tensor], source: int, tag: int = 0) -> Work:
        """Start sending to one rank and receiving from one, the same or another."""
        check(*sends, *receives)
        for peer, tensors in ((to, sends), (source, receives)):
            if tensors and (peer == self.rank or not 0 <= peer < self.size):
                raise UnsupportedError(f"group rank {self.rank} of {self.size} can't reach group rank {peer}")
        sync = self.sync or self._attach()
        if sync.error is not None:
            raise sync.again()
        transfers = [Transfer(to, x, tag) for x in sends]
        transfers += [Transfer(source, x, tag, receives=True) for x in receives]
        return Work(receives or sends, self._messages, self._messages.start(transfers))

    @guarded
    def recv_from_any(self, tensors: Sequence[Tensor], tag: int = 0) -> Work:
        """Receive from the rank that sends first; waits until one does."""
        if self.sync is None:
            self._attach()
        return self.recv(tensors, self._messages.wait_for_any(tag), tag)

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
            del self._windows, self._messages, self._parts
        self._handshake.withdraw()
        self._closed = True


def _fits(x: Tensor, parts: int) -> bool:
    """Whether a tensor's rows divide evenly, are contiguous and fit a window."""
    return x.ndim > 0 and x.shape[0] % parts == 0 and x.numel() * x.itemsize <= WINDOW and x.is_contiguous()


def _rows(x: Tensor, sizes: Sequence[int], parts: int) -> Sequence[Tensor]:
    """Slices by rank along dim 0; equal ones if no sizes are given."""
    sizes = list(sizes) or [x.shape[0] // parts] * parts
    if sum(sizes) != x.shape[0] or len(sizes) != parts:
        raise ConfigError(f"all_to_all: slices of {sizes} over {parts} ranks don't make {x.shape[0]} rows")
    return x.split_with_sizes(sizes)
