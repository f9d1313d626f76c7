"""A recorded denoising step: its calls of denoisers, and which rank computes which of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multicard.guidance.batch import NotSplittableError, take_output
from multicard.guidance.trees import tensors_of
from multicard.partition import split


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """The properties of one call.

    Attributes:
        key: its signature: calls with the same one have arguments and outputs of the same shapes.
        rows: rows of its batch.
        output: its output, with meta tensors.
        pure: it has no side effects, so a rank may skip it.
    """

    key: Hashable
    rows: int
    output: Any
    device: torch.device
    pure: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What one rank computes of a call.

    Attributes:
        shares: the rows of its batch that each rank computes.
        rank: this rank.
        batch: the number of rows that it has.
        total: if ranks compute parts of the batch: two numbers, summed over all ranks, which must all ask for it.
    """

    shares: tuple[range, ...]
    rank: int
    batch: int
    total: Callable[[tuple[float, float]], tuple[float, float]] | None = None

    @property
    def rows(self) -> range:
        """This rank's; none: other ranks compute the call."""
        return self.shares[self.rank]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The calls of a step, and the rows of each that every rank computes. ``number`` counts recorded steps."""

    kinds: tuple[Kind, ...]
    shares: tuple[tuple[range, ...], ...]
    number: int

    def exchanged(self, call: int) -> bool:
        """Whether the output of that call is exchanged: not every rank computes it."""
        return not all(len(share) == self.kinds[call].rows for share in self.shares[call])

    def torn(self, call: int) -> bool:
        """Whether several ranks compute parts of that call's batch."""
        return is_torn(self.shares[call], self.kinds[call].rows)

    def sent(self, rank: int) -> list[tuple[int, list[Tensor]]]:
        """What ``rank`` sends: its calls, and templates of the tensors of their outputs."""
        mine = [(i, shares[rank]) for i, shares in enumerate(self.shares) if shares[rank] and self.exchanged(i)]
        return [(i, tensors_of(part_of(self.kinds[i], share))) for i, share in mine]


def is_torn(parts: Sequence[range], rows: int) -> bool:
    """Whether a rank has some of the ``rows``, but not all."""
    return any(0 < len(part) < rows for part in parts)


def part_of(kind: Kind, share: range) -> Any:
    """Templates of the output of a call on ``share`` of the rows."""
    return kind.output if len(share) == kind.rows else take_output(kind.output, share, kind.rows)


def deal(kinds: Sequence[Kind], may_split: Mapping[Hashable, bool], ranks: int) -> tuple[tuple[range, ...], ...]:
    """The rows of every call that each rank computes: an even split of the rows of all calls, in order.

    A call that can't be split goes to the rank that gets its middle row. Calls that aren't pure are computed by every
    rank, and so is a single call that can't be split.
    """
    pure = [kind for kind in kinds if kind.pure]
    turns = split(sum(kind.rows for kind in pure), ranks)
    shares: list[tuple[range, ...]] = []
    start = 0
    for kind in kinds:
        splits = _has_rows(kind) and may_split.get(kind.key, True)
        if not kind.pure or (len(pure) == 1 and not splits):
            shares.append((range(kind.rows),) * ranks)
            continue
        if splits:
            shares.append(tuple(_overlap(turn, start, kind.rows) for turn in turns))
        else:
            middle = start + (kind.rows - 1) // 2
            shares.append(tuple(range(kind.rows if middle in turn else 0) for turn in turns))
        start += kind.rows
    return tuple(shares)


def _overlap(turn: range, start: int, rows: int) -> range:
    first, end = max(turn.start - start, 0), min(turn.stop - start, rows)
    return range(first, end) if first < end else range(0)


def _has_rows(kind: Kind) -> bool:
    try:
        return kind.rows > 1 and bool(take_output(kind.output, range(1), kind.rows) is not None)
    except NotSplittableError:
        return False
