"""Ulysses (arXiv 2309.14509): each rank gets the whole sequence for some of the heads, attends, and exchanges back.

With a ring outside it is the hybrid schedule: the group's block of the sequence, for some of the heads, is sent around
the ring. Heads and lengths need not divide evenly: every rank computes all ranks' splits. A key/value head is sent only
to the ranks whose query heads read it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from multicard import collectives, partition
from multicard.attention.ring import Joint, ring_attention
from multicard.attention.sequence import from_natural_order, to_natural_order
from multicard.attention.sharding import Sharding
from multicard.attention.visibility import Visibility
from multicard.axis import Axis

PACKED_BYTES = 1 << 18
"""Tensors that are smaller than this together are sent as one message, which costs one more copy."""


def group_attention(
    q: Tensor, k: Tensor, v: Tensor, *, sharding: Sharding, visible: Visibility, scale: float, joint: Joint | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of this rank's rows over all keys: Ulysses within the group, ring between groups.

    Either axis may have size 1.

    Args:
        q, k, v: this rank's slices, all heads.
        visible: for this rank's own rows; its blocks are those of the ring.

    Returns:
        ``(B, rows, H, Dv)``, and the joint queries' ``(B, Sj, H, Dv)`` or None.
    """
    axis = sharding.ulysses
    shares = partition.split_heads(q.shape[2], k.shape[2], axis.size)
    mine, queries, kv = shares[axis.rank], [share.query for share in shares], [share.kv for share in shares]
    if axis.size == 1:
        return ring_attention(
            q, k, v, axis=sharding.ring, visible=visible, segments=mine.segments, scale=scale, joint=joint
        )
    rows, keys = sharding.group_row_sizes, sharding.group_key_sizes
    q, k, v = to_heads([Operand(q, queries, rows), Operand(k, kv, keys), Operand(v, kv, keys)], axis)
    q = to_natural_order(q, sharding.group_rows, 1)
    k, v = (to_natural_order(x, sharding.group_keys, 1) for x in (k, v))
    out, joint_out = ring_attention(
        q,
        k,
        v,
        axis=sharding.ring,
        visible=_visible_to_group(visible, sharding, queries),
        segments=mine.segments,
        scale=scale,
        joint=None if joint is None else _joint_heads(joint, mine),
    )
    out = to_sequence(from_natural_order(out, sharding.group_rows, 1), queries, rows, axis)
    if joint_out is not None:
        joint_out = collectives.all_gather(joint_out, axis, 2, [len(share) for share in queries])
    return out, joint_out


def _joint_heads(joint: Joint, share: partition.HeadShard) -> Joint:
    query, kv = slice(share.query.start, share.query.stop), slice(share.kv.start, share.kv.stop)
    return dataclasses.replace(joint, q=joint.q[:, :, query], k=joint.k[:, :, kv], v=joint.v[:, :, kv])


def _visible_to_group(visible: Visibility, sharding: Sharding, queries: Sequence[range]) -> Visibility:
    """What the group's rows see, for this rank's heads: one exchange for a mask, one for positions, if given."""
    axis, rows, mask, positions = sharding.ulysses, sharding.group_row_sizes, visible.mask, visible.q_positions
    if mask is not None:
        if mask.shape[1] == 1:
            mask = collectives.all_gather(mask, axis, 2, rows)
        else:
            mask = to_heads([Operand(mask.transpose(1, 2), queries, rows)], axis)[0].transpose(1, 2)
        mask = to_natural_order(mask, sharding.group_rows, 2)
    if isinstance(positions, Tensor):
        positions = to_natural_order(collectives.all_gather(positions, axis, 0, rows), sharding.group_rows, 0)
    return dataclasses.replace(visible, mask=mask, q_positions=positions)


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor to exchange.

    Attributes:
        x: ``(B, this rank's rows, heads, D)``.
        heads: which heads each rank gets; several ranks may get the same.
        rows: how many rows each rank holds.
    """

    x: Tensor
    heads: Sequence[range]
    rows: Sequence[int]

    def shape(self, source: int, to: int) -> tuple[int, int, int, int]:
        """The tensor for one rank: ``(rows, B, heads, D)``, so that received ones are concatenated along dim 0."""
        return self.rows[source], self.x.shape[0], len(self.heads[to]), self.x.shape[3]

    def numel(self, source: int, to: int) -> int:
        rows, batch, heads, dim = self.shape(source, to)
        return rows * batch * heads * dim


def to_heads(operands: Sequence[Operand], axis: Axis) -> list[Tensor]:
    """From slices of the sequence with all heads to the whole sequence with some heads.

    One all-to-all a tensor, or one for all if they are small (they have one dtype).

    Returns:
        for every operand ``(B, all rows, this rank's heads, D)``, rows in rank order.
    """
    whole = sum(op.x.shape[0] * sum(op.rows) * op.x.shape[2] * op.x.shape[3] * op.x.element_size() for op in operands)
    if whole <= PACKED_BYTES:
        return _exchange(operands, axis)
    return [_exchange([op], axis)[0] for op in operands]


def _exchange(operands: Sequence[Operand], axis: Axis) -> list[Tensor]:
    ranks, me = range(axis.size), axis.rank
    send = [[op.numel(me, to) for op in operands] for to in ranks]
    receive = [[op.numel(source, me) for op in operands] for source in ranks]
    packed = operands[0].x.new_empty(sum(map(sum, send)))
    places = packed.split(list(itertools.chain.from_iterable(send)))
    for place, (to, op) in zip(places, itertools.product(ranks, operands), strict=True):
        part = op.x[:, :, op.heads[to].start : op.heads[to].stop].transpose(0, 1)
        place.view(part.shape).copy_(part)
    arrived = collectives.all_to_all(packed, axis, [sum(n) for n in send], [sum(n) for n in receive])
    if len(operands) == 1:
        shape = operands[0].shape(0, me)[1:]
        return [arrived.view(sum(operands[0].rows), *shape).transpose(0, 1)]
    parts = arrived.split(list(itertools.chain.from_iterable(receive)))
    return [
        torch.cat([parts[source * len(operands) + i].view(op.shape(source, me)) for source in ranks]).transpose(0, 1)
        for i, op in enumerate(operands)
    ]


def to_sequence(x: Tensor, heads: Sequence[range], rows: Sequence[int], axis: Axis) -> Tensor:
    """The way back: ``(B, all rows, this rank's heads, D)`` to ``(B, this rank's rows, all heads, D)``. One all-to-all.

    Args:
        heads: which heads each rank has, no head twice. rows: how many rows each rank gets.
    """
    batch, dim, mine = x.shape[0], x.shape[3], rows[axis.rank]
    send = [n * batch * x.shape[2] * dim for n in rows]
    receive = [mine * batch * len(share) * dim for share in heads]
    arrived = collectives.all_to_all(x.transpose(0, 1).reshape(-1), axis, send, receive)
    parts = arrived.split(receive)
    views = [part.view(mine, batch, len(share), dim) for part, share in zip(parts, heads, strict=True)]
    return torch.cat(views, 2).transpose(0, 1)
