"""The loop of ring attention: compute attention to a block of keys and values while the next one is being received."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from multicard import collectives
from multicard.attention.kernels import block_attention
from multicard.attention.merge import Accumulator, merge_ranks
from multicard.attention.segments import Segments
from multicard.attention.visibility import Visibility
from multicard.axis import Axis


@dataclasses.dataclass(frozen=True)
class Joint:
    """Tokens that every rank holds, in addition to the sequence.

    Attributes:
        q, k, v: ``(B, Sj, heads, D)``.
        key_mask: ``(B, Sj)`` bool or None.
        front: whether they come before the sequence.
        axis: its ranks share the work on the joint queries.
        keys: the keys of this rank's block for which it computes the joint queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    front: bool
    axis: Axis
    keys: range


def around(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: Axis,
    visible: Visibility,
    segments: Segments,
    scale: float,
    joint: Joint | None,
) -> tuple[Tensor, Tensor | None]:
    """Computes :func:`~multicard.attention.ring.ring_attention` step by step; one message a step each way."""
    total, joint_part = Accumulator(q.shape[1], q.shape[2]), None
    shift = collectives.RingShift(axis)
    for step in range(axis.size):
        block = (axis.rank - step) % axis.size
        if step < axis.size - 1:
            arriving = sum(map(len, visible.blocks[block - 1]))
            shift.start([k, v], [(x.shape[0], arriving, *x.shape[2:]) for x in (k, v)])
        if step == 0 and joint is not None:
            joint_part = _joint_queries(joint, k, v, visible.columns(block, with_mask=False), segments, scale)
            keys, values, mask = _with_joint_keys(joint, k, v, visible.columns(block))
            _attend(total, q, keys, values, mask, segments, scale)
            del keys, values
        else:
            for piece, mask in visible.pieces(block, q.shape[1]):
                rows, cut = slice(piece.rows.start, piece.rows.stop), slice(piece.keys.start, piece.keys.stop)
                _attend(total, q, k[:, cut], v[:, cut], mask, segments, scale, rows, piece.causal)
        if step < axis.size - 1:
            k, v = shift.wait()
    out = total.result(q, v.shape[3])[0]
    if joint is None or joint_part is None:
        return out, None
    return out, merge_ranks(*joint_part.result(joint.q, v.shape[3]), joint.axis).to(out.dtype)


def _attend(
    total: Accumulator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    segments: Segments,
    scale: float,
    rows: slice = slice(None),
    causal: bool = False,
) -> None:
    """One kernel call for every segment of heads, each merged into ``total``."""
    for heads, kv_heads in segments:
        mine, read = slice(heads.start, heads.stop), slice(kv_heads.start, kv_heads.stop)
        seen = mask if mask is None or mask.shape[1] == 1 else mask[:, mine]
        out, lse = block_attention(
            q[:, rows, mine], k[:, :, read], v[:, :, read], scale=scale, causal=causal, mask=seen
        )
        total.add(out, lse, rows, mine)


def _joint_queries(
    joint: Joint, k: Tensor, v: Tensor, mask: Tensor | None, segments: Segments, scale: float
) -> Accumulator:
    """The joint queries over this rank's share of the keys; on the axis's first rank also over the joint keys."""
    share = slice(joint.keys.start, joint.keys.stop)
    k, v, mask = k[:, share], v[:, share], mask if mask is None else mask[..., share]
    if joint.axis.rank == 0:
        k, v, mask = _with_joint_keys(joint, k, v, mask)
    part = Accumulator(joint.q.shape[1], joint.q.shape[2])
    _attend(part, joint.q, k, v, mask, segments, scale)
    return part


def _with_joint_keys(joint: Joint, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A block with the joint keys before or after it, and the mask of both."""

    def beside(own: Tensor, other: Tensor, dim: int) -> Tensor:
        return torch.cat([other, own] if joint.front else [own, other], dim)

    keys, values = beside(k, joint.k, 1), beside(v, joint.v, 1)
    if mask is None and joint.key_mask is None:
        return keys, values, None
    if mask is None:
        mask = torch.ones(1, 1, 1, k.shape[1], dtype=torch.bool, device=k.device)
    if joint.key_mask is None:
        other = torch.ones(1, 1, 1, joint.k.shape[1], dtype=torch.bool, device=k.device)
    else:
        other = joint.key_mask[:, None, None, :]
    if mask.dtype != torch.bool:
        other = torch.zeros(other.shape, dtype=mask.dtype, device=mask.device).masked_fill_(~other, -torch.inf)
    shape = torch.broadcast_shapes(mask.shape[:3], other.shape[:3])
    return keys, values, beside(mask.expand(*shape, -1), other.expand(*shape, -1), 3)
