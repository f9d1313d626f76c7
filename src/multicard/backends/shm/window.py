"""Collectives through exchange windows: each rank has one, which all can read; a step is write, post, wait, read.

A step uses one half of every window and the next step the other, so one wait a step is enough: the data that a rank
overwrites in step s was read in step s-2, as its peers have shown by posting s-1. Larger tensors go in pieces.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from multicard import partition
from multicard.backends.reductions import reduce_into
from multicard.backends.shm.segment import WINDOW, Segment
from multicard.backends.shm.sync import Sync
from multicard.backends.shm.tensor import VIEWS, Flat, flatten

FLAT = 1 << 16
"""Up to this many bytes every rank adds up all data (one wait); above, each adds up its slice (two waits)."""


class Windows:
    """The windows of one group. Every method is a collective, between ``Sync.enter`` and the result.

    Args:
        segment: the group's memory.
        sync: this rank's view of its progress.
    """

    def __init__(self, segment: Segment, sync: Sync) -> None:
        self._memory, self._sync = segment.windows, sync
        self.rank, self.size = sync.rank, sync.size
        self.views = functools.lru_cache(VIEWS)(self._views)

    def _views(self, half: int, dtype: torch.dtype, shape: torch.Size, at: int) -> tuple[list[Tensor], Tensor]:
        """One half of all windows from byte ``at``: as tensors of that shape by rank, and as (ranks, numel)."""
        with torch.inference_mode(False):  # a view made in inference mode could not be written outside
            rows = self._memory[half, :, at : at + shape.numel() * dtype.itemsize].view(dtype)
            return [row.view(shape) for row in rows], rows

    def _slots(self, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """The start of every rank's window, in the half that the next step uses, as a tensor of that shape."""
        return self.views(self._sync.sequence + 1 & 1, dtype, shape, 0)[0]

    def _whole(self, dtype: torch.dtype) -> list[Tensor]:
        """Every rank's whole window, in the half that the next step uses, as elements."""
        return self._slots(dtype, torch.Size((WINDOW // dtype.itemsize,)))

    # ---- every rank gets the same

    def barrier(self) -> None:
        self._sync.post()
        self._sync.await_all()

    def all_reduce(self, x: Tensor, op: str) -> None:
        """Combine all ranks' contiguous ``x`` in place."""
        if x.numel() * x.itemsize > FLAT:
            for part in x.view(-1).split(WINDOW // x.itemsize // self.size * self.size):
                self._reduce_piece(part, op)
            return
        sync, slots = self._sync, self._slots(x.dtype, x.shape)
        sync.await_readers()
        slots[self.rank].copy_(x)
        sync.post()
        sync.await_all()
        reduce_into(x, slots, op)

    def _reduce_piece(self, x: Tensor, op: str) -> None:
        """Every rank adds up its slice of all ranks' data, then all copy the slices: reduce-scatter, all-gather."""
        sync, rank = self._sync, self.rank
        shares = [x[share.start : share.stop] for share in partition.split(x.numel(), self.size)]
        contributions = self._contribute(shares)
        slots, mine = self._whole(x.dtype), shares[rank]
        reduced = slots[rank][: mine.numel()]
        reduce_into(reduced, contributions, op)
        sync.post()
        mine.copy_(reduced)
        sync.await_all()
        for r, share in enumerate(shares):
            if r != rank:
                share.copy_(slots[r][: share.numel()])

    def all_gather(self, outs: Tensor | Sequence[Tensor], x: Tensor, longest: int = 0) -> None:
        """All ranks' ``x`` into ``outs``.

        Args:
            outs: by rank; or ``(ranks, numel)``, contiguous, if all fit a window: then one copy is enough. Empty: this
                rank reads nothing, and all ranks' ``x`` have one size.
            x: this rank's.
            longest: the largest number of elements of any rank, if they may not fit a window.
        """
        sync, half = self._sync, self._sync.sequence + 1 & 1
        if isinstance(outs, Tensor):
            slots, rows = self.views(half, x.dtype, x.shape, 0)
            pairs = [(outs, rows)]
        elif longest * x.itemsize > WINDOW:
            with contextlib.ExitStack() as stack:
                flats = [stack.enter_context(Flat(out)) for out in outs]
                self._all_gather_long(flats, flatten(x), longest)
            return
        else:
            slots = self._slots(x.dtype, x.shape)
            pairs = [(out, self.views(half, x.dtype, out.shape, 0)[0][r]) for r, out in enumerate(outs)]
        sync.await_readers()
        slots[self.rank].copy_(x)
        sync.post()
        if pairs:
            sync.await_all()
        for out, slot in pairs:
            out.copy_(slot)

    def _all_gather_long(self, outs: Sequence[Tensor], x: Tensor, longest: int) -> None:
        if outs and outs[self.rank].data_ptr() != x.data_ptr():
            outs[self.rank].copy_(x)
        for start, slots in self._show(x, longest, reads=bool(outs)):
            for r, (out, slot) in enumerate(zip(outs, slots, strict=True)):
                part = out[start : start + slot.numel()]
                if r != self.rank and part.numel():
                    part.copy_(slot[: part.numel()])

    def reduce(self, x: Tensor, op: str, reads: bool) -> None:
        """Combine all ranks' flat ``x`` in place on the rank that ``reads``."""
        for start, slots in self._show(x, x.numel(), reads):
            reduce_into(x[start : start + slots[0].numel()], slots, op)

    def _show(self, x: Tensor, longest: int, reads: bool) -> Iterator[tuple[int, list[Tensor]]]:
        """Write ``x`` to windows in pieces that fit; yields, if ``reads``, each piece's start and all ranks' pieces."""
        sync, piece = self._sync, WINDOW // x.itemsize
        for start in range(0, longest, piece):
            slots, mine = self._slots(x.dtype, torch.Size((min(piece, longest - start),))), x[start : start + piece]
            sync.await_readers()
            slots[self.rank][: mine.numel()].copy_(mine)
            sync.post()
            if reads:
                sync.await_all()
                yield start, slots

    def broadcast(self, x: Tensor, root: int) -> None:
        """The ``x`` of ``root`` into all ranks' ``x``."""
        if x.numel() * x.itemsize > WINDOW:
            with Flat(x, write=self.rank != root) as flat:
                for part in flat.split(WINDOW // x.itemsize):
                    self.broadcast(part, root)
            return
        sync, slots = self._sync, self._slots(x.dtype, x.shape)
        if self.rank == root:
            sync.await_readers()
            slots[root].copy_(x)
        sync.post()
        if self.rank != root:
            sync.await_one(root)
            x.copy_(slots[root])

    # ---- every rank gets its own

    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], op: str) -> None:
        """``parts`` are this rank's flat contributions by rank; ``out`` gets all ranks' to this one, combined."""
        room = WINDOW // out.itemsize // self.size
        if parts[self.rank].data_ptr() == out.data_ptr():
            parts = [part.clone() if r == self.rank else part for r, part in enumerate(parts)]
        for start in range(0, max(part.numel() for part in parts), room):
            contributions = self._contribute([part[start : start + room] for part in parts])
            mine = out[start : start + room]
            if mine.numel():
                reduce_into(mine, contributions, op)

    def _contribute(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One step: write this rank's flat ``parts`` by rank, in rank order; returns all ranks' parts for this one."""
        sync, rank, slots = self._sync, self.rank, self._whole(parts[0].dtype)
        room = slots[0].numel() // self.size
        sync.await_readers()
        for r, part in enumerate(parts):
            if r != rank and part.numel():
                slots[rank][r * room : r * room + part.numel()].copy_(part)
        sync.post()
        sync.await_all()
        own = parts[rank]
        mine = slice(rank * room, rank * room + own.numel())
        return [own if r == rank else slots[r][mine] for r in range(self.size)]
