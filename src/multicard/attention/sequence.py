"""Slices of a sequence: who holds which positions, and how slices become the whole again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from multicard import collectives, partition
from multicard.mesh import ParallelMesh


def shard_sequence(x: Tensor, mesh: ParallelMesh, dim: int = 1, order: str = "contiguous") -> Tensor:
    """This rank's slice of ``x``, which every rank holds whole. No collective; a view where the slice is one piece.

    Args:
        x: the same on all ranks; its length along ``dim`` is any, below the number of ranks included.
        order: "contiguous", or "zigzag", which gives every rank the same work under a causal mask.

    Raises:
        ConfigError: an unknown order.
    """
    spans = partition.split_sequence(x.shape[dim], mesh.sequence.size, order)[mesh.sequence.rank]
    return take_spans(x, spans, dim)


def gather_sequence(x: Tensor, mesh: ParallelMesh, seq_len: int, dim: int = 1, order: str = "contiguous") -> Tensor:
    """The whole that :func:`shard_sequence` cut ``x`` from, on every rank. One all-gather over ``mesh.sequence``.

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
    """The rows of ``x`` in these spans, in that order; a view where they are one piece."""
    spans = partition.merge_spans(spans)
    if len(spans) == 1:
        return x.narrow(dim, spans[0].start, len(spans[0]))
    parts = [x.narrow(dim, span.start, len(span)) for span in spans]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)


def to_natural_order(x: Tensor, spans: Sequence[range], dim: int) -> Tensor:
    """Rows that hold the positions ``spans``, in that order, sorted by position."""
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
    """Several ranks' spans one after another."""
    return tuple(span for spans in by_rank for span in spans)


def _by_position(spans: Sequence[range]) -> list[int]:
    return sorted(range(len(spans)), key=lambda i: spans[i].start)
