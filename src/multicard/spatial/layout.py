"""Which rows of a tensor each rank holds: pure functions on integers. A *row* is an index of the dim that is split."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from multicard import partition


class Layout(NamedTuple):
    """How a tensor is split along one dim; parts are contiguous and may be empty.

    Attributes:
        dim: the dim that is split.
        cuts: rank r holds rows ``cuts[r]`` to ``cuts[r + 1]``.
        outer: the rows are repeated so often along ``dim``, as where a batch was flattened into it; each rank holds its
            rows of each repetition.
    """

    dim: int
    cuts: tuple[int, ...]
    outer: int = 1

    @property
    def rows(self) -> int:
        return self.cuts[-1]

    @property
    def spans(self) -> tuple[range, ...]:
        """Every rank's rows."""
        return tuple(range(a, b) for a, b in itertools.pairwise(self.cuts))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many rows every rank holds."""
        return tuple(b - a for a, b in itertools.pairwise(self.cuts))

    def at(self, dim: int) -> Layout:
        """The same rows along another dim."""
        return self if dim == self.dim else Layout(dim, self.cuts, self.outer)

    def cut(self, cuts: Sequence[int]) -> Layout:
        """The same dim with other rows."""
        return Layout(self.dim, tuple(cuts), self.outer)

    def shape(self, whole: Sequence[int], rank: int) -> list[int]:
        """The shape of a rank's part of a tensor of shape ``whole``."""
        here = list(whole)
        here[self.dim] = self.outer * len(self.spans[rank])
        return here


def even(dim: int, rows: int, ranks: int) -> Layout:
    """Rows split as evenly as can be."""
    return Layout(dim, (0, *itertools.accumulate(partition.split_sizes(rows, ranks))))


def reshaped(layout: Layout, shape: Sequence[int], new: Sequence[int]) -> tuple[Layout, int] | None:
    """The layout after a reshape of the whole tensor, and of what number all cuts must be multiples for it.

    None: the reshape tears rows apart. In the order of memory a tensor is ``(before, rows, after)``; a new dim takes
    the rows over if what precedes it divides ``before`` and what follows divides ``after``, or the other way round.
    """
    before = math.prod(shape[: layout.dim]) * layout.outer
    after = math.prod(shape[layout.dim + 1 :])
    if not before * layout.rows * after:
        return None
    found: tuple[Layout, int] | None = None
    preceding = 1
    for dim, size in enumerate(new):
        outer, torn = divmod(before, preceding)
        following = math.prod(new[dim + 1 :])
        if not torn and size % outer == 0 and (found is None or size // outer > found[0].rows):
            if after % following == 0:
                found = Layout(dim, tuple(cut * (after // following) for cut in layout.cuts), outer), 1
            elif following % after == 0 and layout.rows % (following // after) == 0:
                block = following // after
                found = Layout(dim, tuple(-(-cut // block) for cut in layout.cuts), outer), block
        preceding *= size
    return found


@dataclasses.dataclass(frozen=True)
class Window:
    """Which rows a row of the result of a convolution or a pooling reads.

    Row ``j`` of the result reads rows ``j * stride - padding + n * dilation`` for ``n`` in ``range(kernel)``; those
    outside the tensor are padding.
    """

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def extent(self) -> int:
        """Rows from the first that is read to the last, and one."""
        return (self.kernel - 1) * self.dilation + 1

    def rows(self, rows: int) -> int:
        """Of the result."""
        return max(0, (rows + 2 * self.padding - self.extent) // self.stride + 1)

    def cuts(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Of the result: each row of it goes to the rank that holds the middle of what it reads."""
        rows = self.rows(cuts[-1])
        inner = (-(-(cut + self.padding - self.extent // 2) // self.stride) for cut in cuts[1:-1])
        return (0, *(min(max(cut, 0), rows) for cut in inner), rows)

    def reads(self, out: range) -> range:
        """What some rows of the result read, padding included."""
        if not out:
            return range(0)
        first = out.start * self.stride - self.padding
        return range(first, (out.stop - 1) * self.stride - self.padding + self.extent)


@dataclasses.dataclass(frozen=True)
class TransposedWindow:
    """Which rows of the result of a transposed convolution a row adds to.

    Row ``i`` adds to rows ``i * stride - padding + n * dilation`` for ``n`` in ``range(kernel)``.
    """

    kernel: int
    stride: int
    padding: int
    dilation: int

    def rows(self, rows: int) -> int:
        """Of the result."""
        return (rows - 1) * self.stride - 2 * self.padding + (self.kernel - 1) * self.dilation + 1

    def cuts(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Of the result."""
        rows = self.rows(cuts[-1])
        return (0, *(min(cut * self.stride, rows) for cut in cuts[1:-1]), rows)

    def reads(self, out: range) -> range:
        """The rows that add to some of the result."""
        if not out:
            return range(0)
        first = out.start + self.padding - (self.kernel - 1) * self.dilation
        return range(-(-first // self.stride), (out.stop - 1 + self.padding) // self.stride + 1)


def inside(wanted: range, rows: int) -> range:
    """Those of the wanted rows that there are."""
    start = min(max(wanted.start, 0), rows)
    return range(start, max(start, min(wanted.stop, rows)))
