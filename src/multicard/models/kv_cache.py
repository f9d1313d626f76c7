"""Keys and values of the tokens so far. The cache knows where they are, so it also computes attention to them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.attention.segments import by_segment
from multicard.models.memory import check_cache
from multicard.partition import HeadShard


class KVCache:
    """A preallocated cache of this rank's key/value heads for the whole sequence, written in place.

    Prompts of unequal length are padded in front, so that all write the same slot at each step; slots before a prompt's
    start are never attended to.

    Args:
        layers: how many layers write into it.
        heads: this rank's query heads and the key/value heads that they read.
        head_dim: size of a head.
        capacity: tokens that it can hold, padding included.
        starts: for every prompt of the batch the slot of its first token.

    Raises:
        ConfigError: it doesn't fit in this rank's memory.
    """

    def __init__(
        self,
        layers: int,
        heads: HeadShard,
        head_dim: int,
        capacity: int,
        starts: Sequence[int] = (0,),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.heads, self.capacity, self.length = heads, capacity, 0
        shape = (len(starts), capacity, len(heads.kv), head_dim)
        check_cache(layers, shape, capacity, dtype, device)
        self._dtype = dtype
        pairs = (torch.empty(2, *shape, dtype=dtype, device=device).unbind() for _ in range(layers))
        self._layers: list[tuple[Tensor, Tensor]] = [(keys, values) for keys, values in pairs]
        self.starts = torch.tensor(starts, device=device)
        self._starts = tuple(starts)
        self._mask: Tensor | None = None
        self._new = range(0)

    @property
    def padded(self) -> bool:
        """Whether some prompt doesn't start in the first slot."""
        return any(self._starts)

    def rows(self) -> list[KVCache]:
        """Every prompt's own cache, without padding, in the same memory."""
        for kept in itertools.chain.from_iterable(self._layers):
            for row, start in enumerate(self._starts):
                kept[row, :start] = 0  # a mask doesn't hide what isn't a number, which unused memory may be
        return [
            self._part([(k[row : row + 1, start:], v[row : row + 1, start:]) for k, v in self._layers], start, (0,))
            for row, start in enumerate(self._starts)
        ]

    def select(self, rows: Sequence[int]) -> KVCache:
        """The cache of some of the prompts, without the padding that all of them have; this one is emptied."""
        chosen, first = list(rows), min(self._starts[row] for row in rows)
        layers: list[tuple[Tensor, Tensor]] = []
        while self._layers:  # one by one: both caches might not fit
            keys, values = self._layers.pop(0)
            layers.append((keys[chosen, first:], values[chosen, first:]))
        return self._part(layers, first, tuple(self._starts[row] - first for row in chosen))

    def _part(self, layers: list[tuple[Tensor, Tensor]], first: int, starts: tuple[int, ...]) -> KVCache:
        part = copy.copy(self)
        part._layers, part._starts, part.starts = layers, starts, self.starts.new_tensor(starts)
        part.length, part.capacity = max(0, self.length - first), self.capacity - first
        return part

    def crop(self, length: int) -> None:
        """Forget all slots but the first ``length``, padding included."""
        assert 0 <= length <= self.length
        self.length = length

    def advance(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for the next tokens ``(batch, tokens)``; return them and their positions ``(batch or 1, tokens)``.

        Padding has position 0 too; nothing attends to it.
        """
        tokens = ids.shape[1]
        self._new = range(self.length, self.length + tokens)
        self.length += tokens
        slots = torch.arange(self._new.start, self._new.stop, device=self.starts.device)
        self._mask = self._causal_mask(slots)
        return ids, (slots - self.starts[:, None]).clamp(min=0) if self.padded else slots[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write ``k``, ``v``, attend with ``q``: each ``(batch, tokens, this rank's heads, head_dim)``, out like q."""
        return by_segment(self._kernel, self.heads.segments, q, *self.keep(layer, k, v))

    def keep(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v``; returns all keys and values so far, ``(batch, length, key/value heads, head_dim)``."""
        keys, values = self._layers[layer]
        start, stop = self._new.start, self._new.stop
        keys[:, start:stop] = k
        values[:, start:stop] = v
        return keys[:, :stop], values[:, :stop]

    def last(self, x: Tensor) -> Tensor:
        """The last token's row of ``(batch, tokens, hidden)``."""
        return x[:, -1:]

    def whole(self, x: Tensor) -> Tensor:
        """All tokens' rows; here they are already on this rank."""
        return x

    def _kernel(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, tokens, heads, dim = q.shape
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if tokens == 1:
            # One token: the query heads of a key/value head are rows of one small attention. On the CPU this is up to
            # six times as fast in bfloat16 as separate heads, and as fast in float32.
            grouped = q.view(batch, keys.shape[1], -1, dim)
            return F.scaled_dot_product_attention(grouped, keys, values, self._mask).reshape(batch, 1, heads, dim)
        causal = self._mask is None
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, self._mask, is_causal=causal, enable_gqa=heads != keys.shape[1]
        )
        return out.transpose(1, 2)

    def _causal_mask(self, slots: Tensor) -> Tensor | None:
        """``(batch or 1, 1, tokens, length)``, 0 to keep and -inf not to; None where the kernel needs none."""
        one_token, from_the_start = len(self._new) == 1, self._new.start == 0
        if not self.padded and (one_token or from_the_start):
            return None
        columns = torch.arange(self.length, device=slots.device)
        keep = columns <= slots[:, None]
        if self.padded:
            real = columns >= self.starts[:, None, None]
            keep = (keep & real) | (
                columns == slots[:, None]
            )  # padding attends to itself, so no row is empty and none becomes NaN
        mask = torch.zeros(keep.shape, dtype=self._dtype, device=slots.device)
        return mask.masked_fill_(~keep, float("-inf")).reshape(-1, 1, len(slots), self.length)
