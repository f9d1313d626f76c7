"""Keys and values sharded over a sequence axis: for contexts beyond one rank's memory, and faster prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multicard import collectives
from multicard.attention import attend, attend_decode, gather_sequence, shard_sequence
from multicard.attention.segments import by_segment
from multicard.mesh import ParallelMesh
from multicard.models.memory import check_cache
from multicard.partition import HeadShard


class SequenceKVCache:
    """A cache of which each rank of ``mesh.sequence`` holds some positions, for this rank's heads.

    A prompt is split in zigzag order, so that ranks have the same causal work, and each keeps the keys that it
    computed. Later tokens, and prompts shorter than two tokens a rank, are computed on every rank and kept by one rank
    in turn (slot modulo ranks); all ranks' attention to their parts of the cache is merged. Both are exact.

    Args:
        mesh: its ring and Ulysses ranks share the sequence.
        layers, heads, head_dim, capacity, starts, dtype: as for :class:`~multicard.models.kv_cache.KVCache`.

    Raises:
        ConfigError: it doesn't fit in this rank's memory.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        layers: int,
        heads: HeadShard,
        head_dim: int,
        capacity: int,
        starts: Sequence[int] = (0,),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.mesh, self.heads, self.length = mesh, heads, 0
        room = capacity // mesh.sequence.size + 4  # zigzag pieces and turns are less uneven than this
        shape = (len(starts), room, len(heads.kv), head_dim)
        check_cache(layers, shape, capacity, dtype, mesh.device)
        self.keys = torch.empty(layers, *shape, dtype=dtype, device=mesh.device)
        self.values = torch.empty_like(self.keys)
        self.slots = torch.empty(room, dtype=torch.int64, device=mesh.device)
        self.starts = torch.tensor(starts, device=mesh.device)
        self.padded = any(starts)
        self._new = range(0)
        self._split = False
        self._split_slots = 0  # of a prompt; ranks keep the later ones in turn
        self._turns = slice(None)
        self._key_mask: Tensor | None = None
        self._mask: Tensor | None = None

    def select(self, rows: Sequence[int]) -> SequenceKVCache:
        """The cache of some of the prompts."""
        index = torch.tensor(rows, device=self.starts.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.starts = self.starts[index]
        return self

    def crop(self, length: int) -> None:
        """Forget all slots but the first ``length``, which hold at least the prompt if that was split."""
        assert self._split_slots <= length <= self.length
        kept = self._new.stop - len(range(length, self.length)[self._turn(length)])
        self._new, self.length = range(kept, kept), length

    def advance(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for the next tokens ``(batch, tokens)``; return this rank's part of them, and its positions."""
        axis, tokens = self.mesh.sequence, ids.shape[1]
        slots = torch.arange(self.length, self.length + tokens, device=ids.device)
        self._split = self.length == 0 and tokens >= 2 * axis.size
        if self._split:
            slots, ids = (shard_sequence(x, self.mesh, dim, "zigzag") for x, dim in ((slots, 0), (ids, 1)))
            self._split_slots, self._turns = tokens, slice(None)
        else:
            self._turns = self._turn(self.length)
        kept = slots[self._turns]
        self._new = range(self._new.stop, self._new.stop + len(kept))
        self.slots[self._new.start : self._new.stop] = kept
        self.length += tokens
        held = self.slots[: self._new.stop]
        self._key_mask = held >= self.starts[:, None] if self.padded else None
        self._mask = None if self._split or tokens == 1 else (held <= slots[:, None])[None, None]
        positions = (slots - self.starts[:, None]).clamp(min=0) if self.padded else slots[None]
        return ids, positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep this rank's ``k``, ``v``, attend with ``q``: each ``(batch, tokens, this rank's heads, head_dim)``.

        Collectives on ``mesh.sequence``: those of ``attend`` for a prompt that is split, else one all-gather.
        """
        start, stop = self._new.start, self._new.stop
        for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
            cache[:, start:stop] = new[:, self._turns]
        if not self._split:
            k, v = self.keys[layer][:, :stop], self.values[layer][:, :stop]
        return by_segment(self._segment, self.heads.segments, q, k, v)

    def last(self, x: Tensor) -> Tensor:
        """The last token's row of ``(batch, this rank's tokens, hidden)`` on every rank. At most one broadcast."""
        x = x[:, -1:]
        return collectives.broadcast(x.contiguous(), self.mesh.sequence, source=0) if self._split else x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens' rows on every rank, in order. At most one all-gather."""
        return gather_sequence(x, self.mesh, self.length, 1, "zigzag") if self._split else x

    def _turn(self, first: int) -> slice:
        """Which of the slots from ``first`` on this rank keeps."""
        axis = self.mesh.sequence
        return slice((axis.rank - first) % axis.size, None, axis.size)

    def _segment(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._split:
            out = attend(
                q,
                k,
                v,
                mesh=self.mesh,
                causal=True,
                seq_len=self.length,
                order="zigzag",
                key_mask=self._key_mask,
            )
            assert isinstance(out, Tensor)
            return out
        return attend_decode(q, k, v, axis=self.mesh.sequence, key_mask=self._key_mask, mask=self._mask)
