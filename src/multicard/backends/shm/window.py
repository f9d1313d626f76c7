"""Collectives in which everybody reads what everybody writes: each rank has a window, and a step is write, post, read.

A step uses one half of every window and the next step the other, so one wait a step is enough: what a rank overwrites
in step s was read in step s-2, and its peers have said so by posting s-1. Tensors larger than a window go in pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multicard import partition
from multicard.backends.reductions import reduce_into
from multicard.backends.shm.segment import LINE, WINDOW, Segment
from multicard.backends.shm.sync import Sync
from multicard.backends.shm.tensor import VIEWS
from multicard.errors import MismatchError

FLAT = 1 << 16
"""Up to this many bytes every rank adds up everything (one wait); above, each adds up its slice (two waits)."""


class Board:
    """The windows of one group. Every method is a collective, between ``Sync.enter`` and the result.

    Args:
        segment: the group's memory.
        sync: this rank's view of its progress.
    """

    def __init__(self, segment: Segment, sync: Sync) -> None:
        self._windows, self._sync = segment.windows, sync
        self.rank, self.size = sync.rank, sync.size
        self._views = functools.lru_cache(VIEWS)(self._make_views)
        self._part = functools.lru_cache(VIEWS)(self._make_part)
        self._columns = functools.lru_cache(VIEWS)(self._make_columns)

    def _make_views(self, half: int, dtype: torch.dtype, shape: torch.Size) -> tuple[list[Tensor], Tensor]:
        size = shape.numel() * dtype.itemsize
        with torch.inference_mode(False):  # a view made in inference mode could not be written outside
            rows = self._windows[half, :, :size].view(dtype)
            return [row.view(shape) for row in rows], rows

    def _slots(self, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """The start of every rank's window, in the half that the next step uses, as a tensor of that shape."""
        return self._views(self._sync.sequence + 1 & 1, dtype, shape)[0]

    def _rows(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The same as one tensor, ``(ranks, elements)``."""
        return self._views(self._sync.sequence + 1 & 1, dtype, shape)[1]

    def _whole(self, dtype: torch.dtype) -> list[Tensor]:
        """Every rank's whole window, in the half that the next step uses, as elements."""
        return self._slots(dtype, torch.Size((WINDOW // dtype.itemsize,)))

    # ---- everybody gets everything

    def barrier(self) -> None:
        self._sync.post()
        self._sync.await_all()

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Combine everybody's contiguous ``x`` in place."""
        if x.numel() * x.itemsize > FLAT:
            for part in x.view(-1).split(WINDOW // x.itemsize // self.size * self.size):
                self._reduce_piece(part, op)
            return
        sync, slots = self._sync, self._slots(x.dtype, x.shape)
        sync.settle()
        slots[self.rank].copy_(x)
        sync.post()
        sync.await_all()
        reduce_into(x, slots, op)

    def _reduce_piece(self, x: Tensor, op: str) -> None:
        """Every rank adds up its slice of everybody's, then everybody copies the slices: reduce-scatter, all-gather."""
        sync, rank = self._sync, self.rank
        shares = [slice(s.start, s.stop) for s in partition.split(x.numel(), self.size)]
        slots = self._whole(x.dtype)
        sync.settle()
        for r, share in enumerate(shares):
            if r != rank:
                slots[rank][share].copy_(x[share])
        sync.post()
        sync.await_all()
        mine = shares[rank]
        parts = [x[mine] if r == rank else slots[r][mine] for r in range(self.size)]
        results = self._whole(x.dtype)
        reduced = results[rank][: mine.stop - mine.start]
        reduce_into(reduced, parts, op)
        sync.post()
        x[mine].copy_(reduced)
        sync.await_all()
        for r, share in enumerate(shares):
            if r != rank:
                x[share].copy_(results[r][: share.stop - share.start])

    def all_gather_rows(self, rows: Tensor, x: Tensor) -> None:
        """Everybody's contiguous ``x``, of one size that fits a window, into the rows of a contiguous matrix."""
        sync, dtype, shape = self._sync, x.dtype, x.shape
        slots, views = self._slots(dtype, shape), self._rows(dtype, shape)
        sync.settle()
        slots[self.rank].copy_(x)
        sync.post()
        sync.await_all()
        rows.copy_(views)

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        """Everybody's ``x`` into ``outs`` by rank, each of which fits a window."""
        sync, dtype = self._sync, x.dtype
        mine, *theirs = [self._slots(dtype, each.shape)[r] for r, each in ((self.rank, x), *enumerate(outs))]
        sync.settle()
        mine.copy_(x)
        sync.post()
        sync.await_all()
        for out, slot in zip(outs, theirs, strict=True):
            out.copy_(slot)

    def all_gather_long(self, outs: Sequence[Tensor], x: Tensor) -> None:
        """Everybody's flat ``x`` into flat ``outs`` by rank; their lengths may differ. ``outs[rank]`` may be ``x``."""
        sync, rank = self._sync, self.rank
        piece = WINDOW // x.itemsize
        for start in range(0, max(out.numel() for out in outs), piece):
            slots = self._whole(x.dtype)
            mine = x[start : start + piece]
            sync.settle()
            slots[rank][: mine.numel()].copy_(mine)
            sync.post()
            if start == 0 and outs[rank].data_ptr() != x.data_ptr():
                outs[rank].copy_(x)
            sync.await_all()
            for r, out in enumerate(outs):
                part = out[start : start + piece]
                if r != rank and part.numel():
                    part.copy_(slots[r][: part.numel()])

    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: str) -> None:
        """``parts`` are this rank's flat contributions by rank; ``out`` gets everybody's to this one, combined."""
        sync, rank = self._sync, self.rank
        room = WINDOW // out.itemsize // self.size
        for start in range(0, max(part.numel() for part in parts), room):
            slots = self._whole(out.dtype)
            sync.settle()
            for r, part in enumerate(parts):
                piece = part[start : start + room]
                if r != rank and piece.numel():
                    slots[rank][r * room : r * room + piece.numel()].copy_(piece)
            sync.post()
            sync.await_all()
            mine = out[start : start + room]
            at = slice(rank * room, rank * room + mine.numel())
            own = parts[rank][start : start + room]
            if mine.numel():
                result = torch.empty_like(mine) if own.data_ptr() == mine.data_ptr() else mine
                reduce_into(result, [own if r == rank else slots[r][at] for r in range(self.size)], op)
                if result is not mine:
                    mine.copy_(result)

    # ---- everybody gets something else

    def write_parts(self, parts: Sequence[Tensor]) -> list[int]:
        """Post this rank's ``parts`` by rank, one of which is its own. Gives the ranks whose parts found no room."""
        sync, rank = self._sync, self.rank
        sync.settle()
        step, at, left = sync.sequence + 1, 0, []
        for to, part in enumerate(parts):
            if to == rank:
                continue
            size = part.numel() * part.itemsize
            fits = at + size <= WINDOW
            self._say_part(to, step, at if fits else None, size)
            if fits:
                self._part(step & 1, rank, at, part.dtype, part.shape).copy_(part)
                at += -(-size // LINE) * LINE
            else:
                left.append(to)
        sync.post()
        return left

    def read_parts(self, parts: Sequence[Tensor]) -> list[int]:
        """Wait for everybody's parts for this rank, into ``parts``. Gives the ranks whose parts come another way."""
        sync, left = self._sync, []
        sync.await_all()
        for source, part in enumerate(parts):
            if source == self.rank:
                continue
            at = self._find_part(source, part.numel() * part.itemsize)
            if at is None:
                left.append(source)
            else:
                part.copy_(self._part(sync.sequence & 1, source, at, part.dtype, part.shape))
        return left

    def write_even_parts(self, x: Tensor) -> None:
        """The same for equal parts of a contiguous tensor that fits a window: one copy for all of them."""
        sync = self._sync
        sync.settle()
        step, size = sync.sequence + 1, x.numel() // self.size * x.itemsize
        self._slots(x.dtype, x.shape)[self.rank].copy_(x)
        for to in range(self.size):
            self._say_part(to, step, to * size, size)
        sync.post()

    def read_even_parts(self, out: Tensor) -> bool:
        """Wait for everybody's parts, and read them in one copy; False if some peer has laid its own out otherwise."""
        sync, numel = self._sync, out.numel() // self.size
        sync.await_all()
        size = numel * out.itemsize
        at = self.rank * size
        for source in range(self.size):
            if self._find_part(source, size) != at:
                return False
        out.view(self.size, numel).copy_(self._columns(sync.sequence & 1, out.dtype, at, numel))
        return True

    def _say_part(self, to: int, step: int, at: int | None, size: int) -> None:
        word = self._sync.part(self.rank, to, step)
        self._sync.words[word] = 0 if at is None else at + 1
        self._sync.words[word + 1] = size

    def _find_part(self, source: int, size: int) -> int | None:
        """Where in its window ``source`` has put its part for this rank; None if it comes another way."""
        sync = self._sync
        word = sync.part(source, self.rank, sync.sequence)
        at, sent = sync.words[word], sync.words[word + 1]
        if sent != size:
            told = f"rank {sync.ranks[source]} sends {sent} bytes to rank {sync.ranks[self.rank]}, which takes {size}"
            raise sync.fail(sync.make_error(MismatchError, source, f"ranks disagree: {told}"))
        return at - 1 if at else None

    def _make_part(self, half: int, rank: int, at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        with torch.inference_mode(False):
            return self._windows[half, rank, at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def _make_columns(self, half: int, dtype: torch.dtype, at: int, numel: int) -> Tensor:
        with torch.inference_mode(False):
            return self._windows[half, :, at : at + numel * dtype.itemsize].view(dtype)

    # ---- one rank gives, or gets

    def broadcast(self, x: Tensor, root: int) -> None:
        """The ``x`` of ``root``, which fits a window, into everybody's."""
        sync, slots = self._sync, self._slots(x.dtype, x.shape)
        if self.rank == root:
            sync.settle()
            slots[root].copy_(x)
        sync.post()
        if self.rank != root:
            sync.await_one(root)
            x.copy_(slots[root])

    def collect(self, x: Tensor, root: int, use: Callable[[slice, list[Tensor]], None]) -> None:
        """Show ``root`` everybody's flat ``x`` piece by piece: it calls ``use(where, pieces by rank)``."""
        sync = self._sync
        piece = WINDOW // x.itemsize
        for start in range(0, x.numel(), piece):
            part = x[start : start + piece]
            slots = self._slots(part.dtype, part.shape)
            sync.settle()
            slots[self.rank].copy_(part)
            sync.post()
            if self.rank == root:
                sync.await_all()
                use(slice(start, start + part.numel()), slots)

    def scatter(self, out: Tensor, parts: Sequence[Tensor], root: int) -> None:
        """``root``'s flat ``parts`` by rank into everybody's flat ``out``, all of one length."""
        sync = self._sync
        room = WINDOW // out.itemsize // self.size
        for start in range(0, out.numel(), room):
            slot = self._whole(out.dtype)[root]
            if self.rank == root:
                sync.settle()
                for r, part in enumerate(parts):
                    piece = part[start : start + room]
                    slot[r * room : r * room + piece.numel()].copy_(piece)
            sync.post()
            mine = out[start : start + room]
            if self.rank != root:
                sync.await_one(root)
            mine.copy_(slot[self.rank * room : self.rank * room + mine.numel()])
