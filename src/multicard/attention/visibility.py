"""Which keys the query rows see, block by block: the only place that handles causality and masks.

Causality is decided on integers. If positions increase, each row sees the keys before some point, and these points form
a staircase. It is cut into full rectangles and causal squares, so kernels need no mask, and empty parts are never
computed. Positions in any other order become an explicit mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from multicard.attention.kernels.base import DEAD
from multicard.attention.sequence import is_sorted, take_spans

MOST_RUNS = 16
"""If positions have more runs than this, a mask is cheaper than pieces."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a block that one kernel call computes.

    Attributes:
        rows: query rows, counted in the rank's own. keys: keys, counted in the block.
        causal: a square in which row i sees keys up to i; otherwise every row sees every key.
    """

    rows: range
    keys: range
    causal: bool = False


def staircase(q_spans: tuple[range, ...], k_spans: tuple[range, ...]) -> tuple[Piece, ...]:
    """The pieces of a causal block: a query sees the keys whose positions aren't above its own.

    ``q_spans`` and ``k_spans`` are runs of consecutive, increasing positions, in the order of rows and keys in memory.
    """
    pieces: list[Piece] = []
    row = 0
    for length, seen, rising in _coalesced(_steps(q_spans, k_spans)):
        rows = range(row, row + length)
        row = rows.stop
        last = next((p for p in reversed(pieces) if not p.causal), None)
        if last and last.keys.stop == seen and last.rows.stop == rows.start:
            pieces[pieces.index(last)] = Piece(range(last.rows.start, rows.stop), last.keys)
        elif seen:
            pieces.append(Piece(rows, range(seen)))
        if rising:
            pieces.append(Piece(rows, range(seen, seen + length), causal=True))
    return tuple(pieces)


Step = tuple[int, int, bool]
"""A number of rows, the keys that all of them see, and whether row i also sees the next i + 1 keys."""


def _steps(q_spans: tuple[range, ...], k_spans: tuple[range, ...]) -> Iterator[Step]:
    for span in q_spans:
        position, seen = span.start, 0
        for run in k_spans:
            if before := range(position, min(run.start, span.stop)):
                yield len(before), seen, False
                position = before.stop
            if along := range(max(position, run.start), min(run.stop, span.stop)):
                yield len(along), seen + along.start - run.start, True
                position = along.stop
            seen += len(run)
        if position < span.stop:
            yield span.stop - position, seen, False


def _coalesced(steps: Iterable[Step]) -> list[Step]:
    joined: list[Step] = []
    for length, seen, rising in steps:
        before, start, rose = joined[-1] if joined else (0, -1, False)
        if rose == rising and seen == start + (before if rising else 0):
            joined[-1] = (before + length, start, rising)
        else:
            joined.append((length, seen, rising))
    return joined


def runs(positions: Tensor) -> tuple[range, ...] | None:
    """1-D positions as runs of consecutive numbers, or None if they don't increase or have too many runs."""
    if positions.numel() == 0:
        return ()
    positions = positions.detach().cpu()
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    if len(breaks) >= MOST_RUNS:
        return None
    spans = [range(int(p[0]), int(p[-1]) + 1) for p in positions.tensor_split(breaks)]
    return tuple(spans) if is_sorted(spans) else None


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys of every block this rank's query rows see. A block is the keys of one rank of the ring.

    Attributes:
        blocks: for every block its spans of keys, by their place in the whole sequence, in the order in memory.
        causal: compare positions.
        q_positions: of the query rows: runs, or a tensor ``(rows,)``. Used only if ``causal``.
        kv_positions: of all keys in natural order ``(keys,)``; None: a key's number is its position.
        mask: ``(B|1, H|1, rows, keys)``, columns in natural order; bool or additive.
        key_mask: ``(B, keys)`` bool, in natural order.
    """

    blocks: tuple[tuple[range, ...], ...]
    causal: bool = False
    q_positions: tuple[range, ...] | Tensor = ()
    kv_positions: Tensor | None = None
    mask: Tensor | None = None
    key_mask: Tensor | None = None

    def pieces(self, block: int, rows: int) -> list[tuple[Piece, Tensor | None]]:
        """The pieces of a block to compute, each with its mask ``(B|1, H|1, rows|1, keys)``, without empty ones."""
        keys = sum(map(len, self.blocks[block]))
        if not rows or not keys:
            return []
        whole = Piece(range(rows), range(keys))
        mask = self.columns(block)
        if not self.causal:
            return _worth_it([(whole, mask)])
        spans = self._spans(block)
        if spans is None:
            return _worth_it([(whole, both(mask, self._compared(block)))])
        return _worth_it([(piece, _cut(mask, piece)) for piece in staircase(*spans)])

    def columns(self, block: int, with_mask: bool = True) -> Tensor | None:
        """The block's columns of ``mask`` and ``key_mask`` combined; one row for all if there is no ``mask``."""
        spans = self.blocks[block]
        mask = take_spans(self.mask, spans, 3) if self.mask is not None and with_mask else None
        keep = None if self.key_mask is None else take_spans(self.key_mask, spans, 1)[:, None, None, :]
        return both(mask, keep)

    def _spans(self, block: int) -> tuple[tuple[range, ...], tuple[range, ...]] | None:
        q_spans = self.q_positions if isinstance(self.q_positions, tuple) else runs(self.q_positions)
        k_spans: tuple[range, ...] | None = self.blocks[block]
        if self.kv_positions is not None:
            k_spans = runs(take_spans(self.kv_positions, self.blocks[block], 0))
        return None if q_spans is None or k_spans is None else (q_spans, k_spans)

    def _compared(self, block: int) -> Tensor:
        q_positions, kv_positions = as_tensor(self.q_positions), self.kv_positions
        k_positions = (
            as_tensor(self.blocks[block]) if kv_positions is None else take_spans(kv_positions, self.blocks[block], 0)
        )
        return (k_positions.to(q_positions.device) <= q_positions[:, None])[None, None]


def as_tensor(positions: tuple[range, ...] | Tensor) -> Tensor:
    if isinstance(positions, Tensor):
        return positions
    return torch.cat([torch.arange(0), *(torch.arange(span.start, span.stop) for span in positions)])


def both(mask: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """A mask AND a bool mask; either may be None."""
    if mask is None or keep is None:
        return keep if mask is None else mask
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)


def _cut(mask: Tensor | None, piece: Piece) -> Tensor | None:
    if mask is None:
        return None
    rows = slice(piece.rows.start, piece.rows.stop) if mask.shape[2] > 1 else slice(None)
    return mask[:, :, rows, piece.keys.start : piece.keys.stop]


def _worth_it(pieces: list[tuple[Piece, Tensor | None]]) -> list[tuple[Piece, Tensor | None]]:
    """Drop pieces whose mask leaves nothing. Only on the CPU: elsewhere this would be a host read."""
    return [(piece, mask) for piece, mask in pieces if mask is None or mask.device.type != "cpu" or _keeps_any(mask)]


def _keeps_any(mask: Tensor) -> bool:
    return bool(mask.any()) if mask.dtype == torch.bool else bool((mask > DEAD).any())
