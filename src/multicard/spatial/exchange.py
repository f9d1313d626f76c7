"""Bringing rows to the ranks that need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multicard import collectives
from multicard.axis import Axis
from multicard.spatial.layout import Layout

Wanted = Sequence[Sequence[range]]
"""By rank, the spans of rows that it needs, in order."""


class Fetch:
    """Rows under way to the ranks that want them: one point-to-point message for each pair of ranks that need one.

    Every rank computes from the layout who sends what, so the ranks don't ask each other.

    Args:
        local: this rank's part.
        wanted: inside the tensor; the same on every rank.
    """

    def __init__(self, local: Tensor, layout: Layout, axis: Axis, wanted: Wanted) -> None:
        if layout.outer > 1:
            local = _unflat(local, layout)
        self._dim = layout.dim + (layout.outer > 1)
        self._flat = layout.outer > 1
        self._local, self._mine = local, layout.spans[axis.rank]
        self._wanted, self._spans, self._rank = wanted[axis.rank], layout.spans, axis.rank
        peers = [rank for rank in range(axis.size) if rank != axis.rank]
        sends = {to: self._packed(_common(wanted[to], self._mine)) for to in peers}
        receives = {source: self._room(_common(self._wanted, layout.spans[source])) for source in peers}
        self._received = receives
        self._exchange = collectives.exchange(sends, receives, axis)

    def wait(self) -> Tensor:
        """The wanted rows, side by side."""
        self._exchange.wait()
        pieces, taken = [], dict.fromkeys(self._received, 0)
        for span in self._wanted:
            for source, theirs in enumerate(self._spans):
                rows = _overlap(span, theirs)
                if not rows:
                    continue
                if source == self._rank:
                    pieces.append(self._local.narrow(self._dim, rows.start - self._mine.start, len(rows)))
                else:
                    pieces.append(self._received[source].narrow(self._dim, taken[source], len(rows)))
                    taken[source] += len(rows)
        if not pieces:
            pieces = [self._local.narrow(self._dim, 0, 0)]
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self._dim)
        return found.flatten(self._dim - 1, self._dim) if self._flat else found

    def _packed(self, spans: Sequence[range]) -> Tensor:
        pieces = [self._local.narrow(self._dim, rows.start - self._mine.start, len(rows)) for rows in spans]
        if not pieces:
            return self._local.narrow(self._dim, 0, 0)
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, self._dim)).contiguous()

    def _room(self, spans: Sequence[range]) -> Tensor:
        shape = list(self._local.shape)
        shape[self._dim] = sum(map(len, spans))
        return self._local.new_empty(shape)


def gather(local: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """The whole tensor, on every rank. One all-gather."""
    if layout.outer == 1:
        return collectives.all_gather(local, axis, layout.dim, layout.sizes)
    unflat = _unflat(local, layout)
    return collectives.all_gather(unflat, axis, layout.dim + 1, layout.sizes).flatten(layout.dim, layout.dim + 1)


def take(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's part of a tensor that is whole here; a view where that can be."""
    span = layout.spans[rank]
    if layout.outer == 1:
        return whole.narrow(layout.dim, span.start, len(span))
    unflat = _unflat(whole, layout)
    return unflat.narrow(layout.dim + 1, span.start, len(span)).flatten(layout.dim, layout.dim + 1)


def _unflat(x: Tensor, layout: Layout) -> Tensor:
    """Repetitions of the rows and rows as two dims."""
    return x.unflatten(layout.dim, (layout.outer, x.shape[layout.dim] // layout.outer))


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _common(spans: Sequence[range], theirs: range) -> list[range]:
    return [rows for span in spans if (rows := _overlap(span, theirs))]
