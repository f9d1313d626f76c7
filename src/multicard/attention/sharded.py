"""Attention over a sharded sequence: checks, the schedule, then Ulysses and ring."""

from __future__ import annotations

from torch import Tensor

from multicard import partition
from multicard.attention.checks import check_joint, check_masks, check_name, check_tensors, whole_lengths
from multicard.attention.ring import Joint
from multicard.attention.schedule import choose_schedule
from multicard.attention.sequence import gather_sequence
from multicard.attention.sharding import Sharding
from multicard.attention.ulysses import group_attention
from multicard.attention.visibility import Visibility
from multicard.axis import Axis
from multicard.mesh import ParallelMesh


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: ParallelMesh,
    *,
    joint: tuple[Tensor, Tensor, Tensor] | None,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    seq_len: int | None,
    kv_seq_len: int | None,
    replicated_kv: bool,
    order: str,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    joint_in_front: bool,
    joint_key_mask: Tensor | None,
    schedule: str,
) -> list[Tensor]:
    """What :func:`~multicard.attention.attend` does, in layout BSND; returns the output, with ``joint`` both."""
    check_name("order", order, partition.ORDERS)
    check_tensors(q, k, v)
    seq_len, kv_seq_len = whole_lengths(q, k, mesh, seq_len, kv_seq_len, order, replicated_kv)
    check_masks(q, k, kv_seq_len, mask, key_mask, q_positions, kv_positions)
    check_joint(q, k, v, joint, joint_key_mask, causal)
    choice = choose_schedule(
        mesh,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        seq_len=seq_len,
        kv_seq_len=kv_seq_len,
        causal=causal,
        order=order,
        masked=mask is not None,
        replicated_kv=replicated_kv,
        schedule=schedule,
    )
    sharding = Sharding.of(mesh, choice.axes(mesh), seq_len, kv_seq_len, order, replicated_kv)

    def whole(x: Tensor | None, dim: int) -> Tensor | None:
        return x if x is None or replicated_kv else gather_sequence(x, mesh, kv_seq_len, dim, order)

    visible = Visibility(
        blocks=sharding.blocks,
        causal=causal,
        q_positions=sharding.positions(kv_seq_len - seq_len) if q_positions is None or not causal else q_positions,
        kv_positions=whole(kv_positions, 0) if causal else None,
        mask=mask,
        key_mask=whole(key_mask, 1),
    )
    tokens = None
    if joint is not None:
        tokens = Joint(*joint, joint_key_mask, joint_in_front, *_joint_work(mesh, sharding))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    outs = group_attention(q, k, v, sharding=sharding, visible=visible, scale=scale, joint=tokens)
    return [out for out in outs if out is not None]


def _joint_work(mesh: ParallelMesh, sharding: Sharding) -> tuple[Axis, range]:
    """The axis that shares the work on the joint queries, and the keys of this rank's block that are its share."""
    if sharding.replicated_kv:
        keys = sum(map(len, sharding.keys[0]))
        return mesh.sequence, partition.split(keys, mesh.sequence.size)[mesh.sequence.rank]
    return sharding.ring, range(sum(map(len, sharding.blocks[sharding.ring.rank])))
