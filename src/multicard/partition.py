"""Which rows belong to which rank: decided only here, by pure functions on integers. A span is a ``range``.

Every rank computes all ranks' spans from the same integers, so no collective is needed to learn sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from multicard.errors import ConfigError

ORDERS = ("contiguous", "zigzag")


def split(size: int, parts: int) -> tuple[range, ...]:
    """``size`` rows in ``parts`` contiguous spans, the first ``size mod parts`` one longer; spans may be empty."""
    if size < 0 or parts < 1:
        raise ConfigError(f"can't split {size} rows in {parts} parts: sizes are 0 or more, parts 1 or more")
    short, longer = size // parts, size % parts  # not divmod, which Dynamo doesn't trace
    starts = [i * short + min(i, longer) for i in range(parts + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(starts))


def split_blocks(size: int, parts: int, block: int) -> tuple[range, ...]:
    """:func:`split` at multiples of ``block``, as long as every part gets one."""
    if block == 1 or size < block * parts:
        return split(size, parts)
    return tuple(range(span.start * block, min(span.stop * block, size)) for span in split(-(-size // block), parts))


def chunks(spans: Sequence[range], size: int) -> list[tuple[range, ...]]:
    """The same rows in the same order, ``size`` of them at a time."""
    found: list[list[range]] = []
    free = 0
    for span in spans:
        while span:
            if not free:
                found.append([])
                free = size
            found[-1].append(span[:free])
            free, span = free - len(span[:free]), span[free:]
    return [tuple(each) for each in found]


def split_sizes(size: int, parts: int) -> tuple[int, ...]:
    """The lengths of :func:`split`."""
    return tuple(len(share) for share in split(size, parts))


@dataclasses.dataclass(frozen=True)
class HeadShard:
    """One rank's query heads and the key/value heads that they read.

    Attributes:
        query: this rank's query heads, global numbers.
        kv: the key/value heads that they attend to, global numbers. Neighbouring ranks may hold the same one.
        segments: ``(query heads, kv heads)`` in local numbers, each with the same number of query heads for every
            key/value head, so that one grouped-query kernel call computes it. One segment if the rank's groups are
            equal; at most three otherwise (the end of a group, whole groups, the start of a group).
    """

    query: range
    kv: range
    segments: tuple[tuple[range, range], ...]

    @property
    def uniform(self) -> bool:
        """One grouped-query kernel call computes all of this rank's heads."""
        return len(self.segments) <= 1


def split_heads(heads: int, kv_heads: int, parts: int) -> tuple[HeadShard, ...]:
    """Query heads split evenly in order; each rank gets the key/value heads that its query heads read.

    Query head ``h`` reads key/value head ``h // (heads / kv_heads)`` (grouped-query attention, arXiv 2305.13245).
    A key/value head is replicated only on the ranks that read it; with fewer key/value heads than ranks, some share.

    Raises:
        ConfigError: ``heads`` isn't a multiple of ``kv_heads``.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"{heads} attention heads over {kv_heads} key/value heads: must be a multiple")
    group = heads // kv_heads
    return tuple(_head_shard(query, group) for query in split(heads, parts))


def _head_shard(query: range, group: int) -> HeadShard:
    kv = range(query.start // group, -(-query.stop // group)) if query else range(0)
    counts = [min(query.stop, (h + 1) * group) - max(query.start, h * group) for h in kv]
    segments: list[tuple[range, range]] = []
    q0 = k0 = 0
    for k1, count in enumerate(counts, start=1):
        if k1 == len(counts) or counts[k1] != count:
            q1 = q0 + count * (k1 - k0)
            segments.append((range(q0, q1), range(k0, k1)))
            q0, k0 = q1, k1
    return HeadShard(query, kv, tuple(segments))


def split_sequence(seq_len: int, parts: int, order: str = "contiguous") -> tuple[tuple[range, ...], ...]:
    """Every rank's spans of positions, in the order in which it holds them.

    ``contiguous``: one span a rank. ``zigzag``: ``2·parts`` pieces by the same rule; rank i holds pieces i and
    ``2·parts-1-i``, which gives every rank the same causal work. Empty spans are left out.

    Raises:
        ConfigError: an unknown order.
    """
    if order == "contiguous":
        return tuple((share,) if share else () for share in split(seq_len, parts))
    if order == "zigzag":
        pieces = split(seq_len, 2 * parts)
        return tuple(tuple(p for p in (pieces[i], pieces[-1 - i]) if p) for i in range(parts))
    raise ConfigError(f"order={order!r}: must be one of {', '.join(ORDERS)}")


def sequence_sizes(seq_len: int, parts: int, order: str = "contiguous") -> tuple[int, ...]:
    """How many positions every rank holds."""
    return tuple(sum(map(len, spans)) for spans in split_sequence(seq_len, parts, order))


def merge_spans(spans: Sequence[range]) -> tuple[range, ...]:
    """The fewest spans that read the same rows in the same order: adjacent ones joined, empty ones dropped."""
    merged: list[range] = []
    for span in spans:
        if not span:
            continue
        if merged and merged[-1].stop == span.start:
            merged[-1] = range(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return tuple(merged)
