"""Which rank holds which rows and keys during one call, for every schedule: integers only."""

from __future__ import annotations

import dataclasses

from multicard import partition
from multicard.attention.sequence import flatten
from multicard.axis import Axis
from multicard.mesh import ParallelMesh

Spans = tuple[range, ...]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The slices of one attention call, by their place in the whole sequence.

    A Ulysses group holds its members' slices together, so the blocks of whole groups are sent around the ring. Before
    the exchange a group's rows are in rank order; after it they are sorted.

    Attributes:
        ring, ulysses: the axes in use; either may be of size 1.
        rows, keys: the spans of each sequence rank.
        rank: this rank's number in the sequence axis.
        replicated_kv: every rank holds all keys: one block, no ring.
    """

    ring: Axis
    ulysses: Axis
    rows: tuple[Spans, ...]
    keys: tuple[Spans, ...]
    rank: int
    replicated_kv: bool

    @classmethod
    def of(
        cls, mesh: ParallelMesh, axes: tuple[Axis, Axis], seq_len: int, kv_seq_len: int, order: str, replicated_kv: bool
    ) -> Sharding:
        size = mesh.sequence.size
        rows = partition.split_sequence(seq_len, size, order)
        keys = ((range(kv_seq_len),),) * size if replicated_kv else partition.split_sequence(kv_seq_len, size, order)
        return cls(*axes, rows, keys, mesh.sequence.rank, replicated_kv)

    @property
    def group_rows(self) -> Spans:
        """The rows of this rank's Ulysses group, in rank order."""
        return flatten(self.rows[rank] for rank in self._mine)

    @property
    def group_keys(self) -> Spans:
        return flatten(self.keys[rank] for rank in self._mine)

    @property
    def group_row_sizes(self) -> list[int]:
        """How many rows each rank of the Ulysses group holds."""
        return [sum(map(len, self.rows[rank])) for rank in self._mine]

    @property
    def group_key_sizes(self) -> list[int]:
        return [sum(map(len, self.keys[rank])) for rank in self._mine]

    @property
    def blocks(self) -> tuple[Spans, ...]:
        """The keys of every ring rank's group, sorted."""
        if self.replicated_kv:
            return (self.keys[0],)
        groups = (flatten(self.keys[rank] for rank in self._group(i)) for i in range(self.ring.size))
        return tuple(map(_sorted, groups))

    def positions(self, offset: int) -> Spans:
        """Default positions of the group's rows, sorted; the first query of the sequence is at ``offset``."""
        return tuple(range(span.start + offset, span.stop + offset) for span in _sorted(self.group_rows))

    @property
    def _mine(self) -> range:
        return self._group(self.rank // self.ulysses.size)

    def _group(self, ring_rank: int) -> range:
        return range(ring_rank * self.ulysses.size, (ring_rank + 1) * self.ulysses.size)


def _sorted(spans: Spans) -> Spans:
    return partition.merge_spans(sorted(spans, key=lambda span: span.start))
