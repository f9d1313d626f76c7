"""Sharding a sequence and gathering it again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from multicard import collectives, partition
from multicard.mesh import ParallelMesh


def shard_sequence(x: Tensor, mesh: ParallelMesh, dim: int = 1, order: str = "contiguous") -> Tensor:
    """This rank's slice of ``x``, which every rank holds whole. No collective; a view if the slice is contiguous.

    Args:
        x: the same on all ranks; of any length along ``dim``, even less than the number of ranks.
        order: "contiguous", or "zigzag", which gives every rank the same work under a causal mask.

    Raises:
        ConfigError: an unknown order.
    """
    spans = partition.split_sequence(x.shape[dim], mesh.sequence.size, order)[mesh.sequence.rank]
    return take_spans(x, spans, dim)


def gather_sequence(x: Tensor, mesh: ParallelMesh, seq_len: int, dim: int = 1, order: str = "contiguous") -> Tensor:
    """The inverse of :func:`shard_sequence`: the whole tensor on every rank. One all-gather over ``mesh.sequence``.

    Args:
        x: this rank's slice. seq_len: the whole's length along ``dim``.

    Raises:
        ConfigError: ``x`` isn't this rank's slice of ``seq_len`` positions, or an unknown order.
    """
    axis = mesh.sequence
    sizes = partition.sequence_sizes(seq_len, axis.size, order)
    by_rank = partition.split_sequence(seq_len, axis.size, order)
    return to_natural_order(collectives.all_gather(x, axis, dim, sizes), flatten(by_rank), dim)


def take_spans(x: Tensor, spans: Sequence[range], dim: int) -> Tensor:
    """The rows of ``x`` in these spans, in that order; a view if they are contiguous."""
    spans = partition.merge_spans(spans)
    if len(spans) == 1:
        return x.narrow(dim, spans[0].start, len(spans[0]))
    parts = [x.narrow(dim, span.start, len(span)) for span in spans]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)


def to_natural_order(x: Tensor, spans: Sequence[range], dim: int) -> Tensor:
    """Sort rows by position; ``spans`` are the rows' positions in the given order."""
    if is_sorted(spans):
        return x
    parts = x.split([len(span) for span in spans], dim)
    return torch.cat([parts[i] for i in _by_position(spans)], dim)


def from_natural_order(x: Tensor, spans: Sequence[range], dim: int) -> Tensor:
    """The inverse of :func:`to_natural_order`."""
    if is_sorted(spans):
        return x
    order = _by_position(spans)
    parts = dict(zip(order, x.split([len(spans[i]) for i in order], dim), strict=True))
    return torch.cat([parts[i] for i in range(len(spans))], dim)


def is_sorted(spans: Sequence[range]) -> bool:
    return all(a.stop <= b.start for a, b in itertools.pairwise(spans))


def flatten(by_rank: Iterable[Sequence[range]]) -> tuple[range, ...]:
    """Several ranks' spans, concatenated."""
    return tuple(span for spans in by_rank for span in spans)


def _by_position(spans: Sequence[range]) -> list[int]:
    return sorted(range(len(spans)), key=lambda i: spans[i].start)
