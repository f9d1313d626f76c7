"""A ``transformers`` cache with keys and values sharded over the sequence axis.

A chunk that was computed in slices stays where it was computed; tokens computed by every rank (decoding) go to the
ranks in turn, a page each. Lengths alone determine which rank holds which position, so no exchange is needed for it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from multicard import partition
from multicard.attention.sequence import take_spans
from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.seams import bypassed

PAGE = 32
"""Consecutive decoded tokens on one rank before it is the next rank's turn."""

Spans = tuple[range, ...]

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache argument of models' ``forward``: since transformers 5.24, and before."""


def cache_name(module: nn.Module) -> str:
    """The name of the cache argument of ``module.forward``.

    Raises:
        UnsupportedError: it is neither of the two known names.
    """
    for name in inspect.signature(module.forward).parameters:
        if name in CACHE_NAMES:
            return name
    raise bypassed("transformers", f"{type(module).__name__}.forward takes none of {', '.join(CACHE_NAMES)}")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The new tokens of one forward pass.

    Attributes:
        start: the number of earlier tokens. length: the number of new ones.
        sliced: each rank computes a zigzag slice of them; otherwise every rank computes all.
        axis: the ranks.
    """

    start: int
    length: int
    sliced: bool
    axis: Axis

    @classmethod
    def of(cls, start: int, length: int, axis: Axis) -> Chunk:
        """The next chunk, sliced if every rank gets both its zigzag pieces."""
        return cls(start, length, length >= 2 * axis.size, axis)

    @property
    def stop(self) -> int:
        return self.start + self.length

    @functools.cached_property
    def held(self) -> tuple[Spans, ...]:
        """By rank, the positions whose keys it stores."""
        if self.sliced:
            by_rank = partition.split_sequence(self.length, self.axis.size, "zigzag")
            return tuple(tuple(range(s.start + self.start, s.stop + self.start) for s in spans) for spans in by_rank)
        pages: list[list[range]] = [[] for _ in range(self.axis.size)]
        position = self.start
        while position < self.stop:
            page = position // PAGE
            stop = min((page + 1) * PAGE, self.stop)
            pages[page % self.axis.size].append(range(position, stop))
            position = stop
        return tuple(map(tuple, pages))

    @property
    def mine(self) -> Spans:
        return self.held[self.axis.rank]


def take(x: Tensor, spans: Spans, start: int, dim: int) -> Tensor:
    """The positions ``spans`` of ``x``, which begins at position ``start``; a view where they are one run."""
    return take_spans(x, [range(span.start - start, span.stop - start) for span in spans], dim)


def _refusing(what: str, who: str) -> Any:
    def refuse(self: DynamicLayer, *args: Any) -> None:
        raise UnsupportedError(
            f"{what} ({who}) on a cache that is split over ranks: use greedy or sampling, or tp alone"
        )

    return refuse


class ShardedLayer(DynamicLayer):
    """One layer's keys and values at this rank's positions: ``(batch, heads, positions here, head_dim)``.

    The buffer grows by a page at a time, so most decoded tokens need no copy.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, cache: ShardedCache) -> None:
        super().__init__()
        self.cache = cache
        self.seen = self.used = 0
        self.room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store this rank's part of the new keys and values; returns all its keys and values."""
        chunk = self.cache.chunk
        if chunk is None:
            raise UnsupportedError("a sharded cache is used outside its model: call the model, not its layers")
        new = [key_states, value_states]
        if not chunk.sliced:
            new = [take(x, chunk.mine, chunk.start, 2) for x in new]
        self._store(new)
        self.seen = chunk.stop
        self.keys, self.values = (x.narrow(2, 0, self.used) for x in self.room)
        self.is_initialized = True
        return self.keys, self.values

    def _store(self, new: list[Tensor]) -> None:
        count = new[0].shape[2]
        if not self.room:
            self.room = [x.contiguous() for x in new]
        elif self.used + count > self.room[0].shape[2]:
            spare = max(PAGE, count)
            self.room = [
                torch.cat([old[:, :, : self.used], x, x.new_empty(*x.shape[:2], spare - count, x.shape[3])], 2)
                for old, x in zip(self.room, new, strict=True)
            ]
        elif count:
            for old, x in zip(self.room, new, strict=True):
                old[:, :, self.used : self.used + count] = x
        self.used += count

    def get_seq_length(self) -> int:
        """The number of positions on all ranks together."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @property
    def nbytes(self) -> int:
        """What this rank's part takes, room to grow included."""
        return sum(x.nbytes for x in self.room)

    crop = _refusing("crop", "assisted generation")
    reorder_cache = _refusing("reorder_cache", "beam search")
    batch_repeat_interleave = _refusing("batch_repeat_interleave", "contrastive search")
    batch_select_indices = _refusing("batch_select_indices", "contrastive search")


class ShardedCache(DynamicCache):
    """All layers' keys and values at this rank's positions.

    Attributes:
        chunk: the new tokens of the current forward pass, or None.
        chunks: the tokens of all earlier passes.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.layer_class_to_replicate = functools.partial(ShardedLayer, self)  # type: ignore[assignment]
        self.axis = axis
        self.chunk: Chunk | None = None
        self.chunks: list[Chunk] = []

    def written(self) -> int:
        """The number of layers that have stored the current pass's new tokens."""
        assert self.chunk is not None
        return sum(isinstance(layer, ShardedLayer) and layer.seen == self.chunk.stop for layer in self.layers)

    def end(self) -> None:
        """End the current pass: its tokens become earlier ones."""
        chunk, last = self.chunk, self.chunks[-1] if self.chunks else None
        assert chunk is not None
        if last and not last.sliced and not chunk.sliced:
            self.chunks[-1] = dataclasses.replace(last, length=last.length + chunk.length)
        else:
            self.chunks.append(chunk)
        self.chunk = None

    @property
    def length(self) -> int:
        """The number of positions before the current pass, on all ranks together."""
        return self.chunks[-1].stop if self.chunks else 0

    def spans(self) -> tuple[Spans, ...]:
        """By rank, its positions in storage order, including those of the current pass."""
        chunks = [*self.chunks, *([self.chunk] if self.chunk else [])]
        return tuple(
            partition.merge_spans([span for chunk in chunks for span in chunk.held[rank]])
            for rank in range(self.axis.size)
        )

    @property
    def nbytes(self) -> int:
        """What this rank's part takes, room to grow included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, ShardedLayer))

    def reset(self) -> None:
        """Drop all keys and values."""
        self.layers, self.chunks, self.chunk = [], [], None
