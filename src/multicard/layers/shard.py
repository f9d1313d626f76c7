"""A parameter owns its shard rule: which slices of the whole tensor it holds, along which dimension.

The loader reads only the bytes that the rule names; ``from_linear`` copies only the rows that it names.
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
"""One rank's slices of one dimension, in storage order."""

Shares = tuple[Spans, ...]
"""All ranks' spans, by rank."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The slices ``spans`` of a whole tensor of shape ``shape`` along ``dim``.

    Attributes:
        parts: names and sizes along ``dim`` of the tensors that a checkpoint holds instead of the fused whole:
            ``(("q_proj", 576), ("k_proj", 192), ...)``. Empty: the whole is one tensor.
        transposed: a checkpoint holds the matrix with its dimensions exchanged (GPT-2's ``Conv1D``).
        fill: every element is this number, and the tensor isn't in checkpoints; None: it is.
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
        """A copy of this rank's part of ``whole``."""
        if tuple(whole.shape) != self.shape:
            raise ConfigError(f"a tensor of shape {tuple(whole.shape)}: must be {self.shape}, as declared")
        parts = [whole.narrow(self.dim, span.start, len(span)) for span in self.spans]
        if not parts:
            return whole.new_empty(self.local_shape)
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def sharded(data: Tensor, shard: Shard) -> nn.Parameter:
    """An inference parameter with its shard rule."""
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
    """A parameter's shard rule; a parameter without one is whole on every rank."""
    whole = Shard(tuple(parameter.shape), 0, (range(parameter.shape[0]),)) if parameter.dim() else Shard((), 0, ())
    return getattr(parameter, "shard", whole)


def even_shares(size: int, parts: int) -> Shares:
    """One contiguous span a rank; the first ``size mod parts`` ranks have one more row."""
    return tuple((span,) if span else () for span in partition.split(size, parts))


def concatenated(blocks: Sequence[tuple[Shares, int]]) -> Shares:
    """All ranks' spans of several blocks, one after the other; a block is given as its own shares and its length."""
    shares: list[Spans] = [()] * len(blocks[0][0])
    start = 0
    for block, length in blocks:
        for rank, spans in enumerate(block):
            shares[rank] += tuple(range(start + span.start, start + span.stop) for span in spans)
        start += length
    return tuple(shares)


def halves(size: int, parts: int) -> Shares:
    """All ranks' spans of two halves, each split evenly (gate and up of a gated MLP)."""
    return concatenated([(even_shares(size // 2, parts), size // 2)] * 2)


def count(spans: Spans) -> int:
    """The total number of rows."""
    return sum(map(len, spans))


def check_shares(shares: Sequence[Sequence[range]] | None, size: int, axis: Axis) -> Shares:
    """``shares`` with adjacent spans joined, and checked; None: an even split.

    Raises:
        ConfigError: the number of shares isn't that of ranks, or a span is outside ``range(size)``.
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
    """Check that every row is on exactly one rank, as a sum over ranks requires.

    Raises:
        ConfigError: no rank or several ranks hold a row.
    """
    spans = sorted((span for spans in shares for span in spans), key=lambda span: span.start)
    if partition.merge_spans(spans) != ((range(size),) if size else ()):
        raise ConfigError(f"{what} needs each of {size} rows on exactly one rank, not {shares}")
