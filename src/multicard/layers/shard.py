"""A parameter owns its shard rule: which slices of the whole tensor it is, along which dimension.

The loader asks the rule and reads only those bytes; ``from_linear`` asks the same rule and copies only those rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multicard import partition
from multicard.axis import Axis
from multicard.errors import ConfigError

Spans = tuple[range, ...]
"""Slices of one dimension that one rank holds, in the order in which it holds them."""

Shares = tuple[Spans, ...]
"""Everybody's spans, by rank."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The slices ``spans`` of a whole tensor of shape ``shape`` along ``dim``.

    Attributes:
        parts: what the whole is fused of, along ``dim``, where a checkpoint holds it in pieces:
            ``(("q_proj", 576), ("k_proj", 192), ...)``. Empty: the whole is one tensor.
        transposed: a checkpoint holds the matrix with its dimensions exchanged (GPT-2's ``Conv1D``).
        fill: every element is this number, and no checkpoint holds the tensor; None: one does.
    """

    shape: tuple[int, ...]
    dim: int
    spans: Spans
    parts: tuple[tuple[str, int], ...] = ()
    transposed: bool = False
    fill: float | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], count(self.spans), *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of ``whole``, as a tensor of its own."""
        if tuple(whole.shape) != self.shape:
            raise ConfigError(f"a tensor of shape {tuple(whole.shape)} where {self.shape} was declared")
        parts = [whole.narrow(self.dim, span.start, len(span)) for span in self.spans]
        if not parts:
            return whole.new_empty(self.local_shape)
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def sharded(data: Tensor, shard: Shard) -> nn.Parameter:
    """An inference parameter that carries its shard rule."""
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.shard = shard  # type: ignore[attr-defined]
    return parameter


def empty(shard: Shard, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    """Memory for this rank's part."""
    return sharded(torch.empty(shard.local_shape, dtype=dtype, device=device), shard)


def cut(whole: Tensor, shard: Shard) -> nn.Parameter:
    """This rank's part of ``whole``."""
    return sharded(shard.take(whole.detach()), shard)


def shard_of(parameter: Tensor) -> Shard:
    """The rule that a parameter carries; one that carries none is whole on every rank."""
    whole = Shard(tuple(parameter.shape), 0, (range(parameter.shape[0]),)) if parameter.dim() else Shard((), 0, ())
    return getattr(parameter, "shard", whole)


def even_shares(size: int, parts: int) -> Shares:
    """One contiguous span a rank, the first ``size mod parts`` ranks one row more."""
    return tuple((span,) if span else () for span in partition.split(size, parts))


def concatenated(blocks: Sequence[tuple[Shares, int]]) -> Shares:
    """Everybody's spans of blocks that stand one after the other; a block is its own shares and its length."""
    shares: list[Spans] = [()] * len(blocks[0][0])
    start = 0
    for block, length in blocks:
        for rank, spans in enumerate(block):
            shares[rank] += tuple(range(start + span.start, start + span.stop) for span in spans)
        start += length
    return tuple(shares)


def halves(size: int, parts: int) -> Shares:
    """Everybody's spans of two halves, each split evenly (gate and up of a gated MLP)."""
    return concatenated([(even_shares(size // 2, parts), size // 2)] * 2)


def count(spans: Spans) -> int:
    """Rows in all."""
    return sum(map(len, spans))


def check_shares(shares: Sequence[Sequence[range]] | None, size: int, axis: Axis) -> Shares:
    """``shares`` merged and checked, or the even ones.

    Raises:
        ConfigError: not one share a rank, or a span outside ``range(size)``.
    """
    if shares is None:
        return even_shares(size, axis.size)
    if len(shares) != axis.size:
        raise ConfigError(
            f"{len(shares)} shares for the {axis.size} ranks of axis {axis.name!r}: pass one share for each rank"
        )
    merged = tuple(partition.merge_spans(spans) for spans in shares)
    for rank, spans in enumerate(merged):
        for span in spans:
            if span.start < 0 or span.stop > size or span.step != 1:
                raise ConfigError(f"rank {rank}'s share {span} lies outside range({size})")
    return merged


def check_partition(shares: Shares, size: int, what: str) -> None:
    """Every row on exactly one rank, as a sum over ranks needs.

    Raises:
        ConfigError: a row that no rank or several ranks hold.
    """
    spans = sorted((span for spans in shares for span in spans), key=lambda span: span.start)
    if partition.merge_spans(spans) != ((range(size),) if size else ()):
        raise ConfigError(f"{what} needs each of {size} rows on exactly one rank, not {shares}")
