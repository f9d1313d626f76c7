"""``attend``: one exact attention call for every mesh."""

from __future__ import annotations

from torch import Tensor

from multicard import partition
from multicard.attention.checks import check_joint, check_masks, check_name, check_tensors, whole_lengths
from multicard.attention.no_backward import inference_only
from multicard.attention.ring import Joint
from multicard.attention.schedule import choose_schedule
from multicard.attention.sequence import gather_sequence
from multicard.attention.sharding import Sharding
from multicard.attention.ulysses import group_attention
from multicard.attention.visibility import Visibility
from multicard.axis import Axis
from multicard.mesh import ParallelMesh

LAYOUTS = ("BSND", "BNSD")
JOINT_POSITIONS = ("front", "rear")


@inference_only
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: ParallelMesh,
    causal: bool = False,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    layout: str = "BSND",
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    replicated_kv: bool = False,
    order: str = "contiguous",
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    joint: tuple[Tensor, Tensor, Tensor] | None = None,
    joint_position: str = "front",
    joint_key_mask: Tensor | None = None,
    schedule: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale + mask)·v over a sequence that is sharded over ``mesh.sequence``.

    The ranks' outputs, gathered, equal attention over the whole sequence on one card. Rows with nothing to attend to
    give zeros. For inference: a backward raises. Collective over ``mesh.sequence``: every rank makes the same call.

    Communication: for Ulysses two all-to-alls (four if tensors are large); for a ring one point-to-point message a
    tensor and step; one all-gather for each given one of ``key_mask``, ``kv_positions`` and ``joint``.

    Args:
        q: ``(B, local rows, H, D)``. k: ``(B, local keys, Hkv, D)``. v: ``(B, local keys, Hkv, Dv)``. H a multiple of
            Hkv; any floating dtype, the same for all; any strides; lengths may be zero.
        mesh: this rank holds slice number ``mesh.sequence.rank`` of the sequence.
        causal: a query sees the keys whose positions aren't above its own. By default the last query and the last key
            have the same position.
        key_mask: ``(B, local keys)`` bool, True = may be attended to.
        mask: ``(B|1, H|1, local rows, kv_seq_len)``, bool (True = keep) or added to the scores; columns in natural
            order. Numbers below -1e37 drop a key as -inf does.
        scale: None means ``1/√D``.
        layout: "BSND", or "BNSD" with heads before rows; of q, k, v, joint and the results.
        seq_len, kv_seq_len: of the whole sequence. ``seq_len=None``: every rank holds the same number of rows.
            ``kv_seq_len=None``: ``seq_len`` if given; otherwise every rank holds the same number of keys.
        replicated_kv: every rank holds all keys and values (and ``key_mask``), in natural order.
        order: "contiguous" or "zigzag"; how the sequence was sharded.
        q_positions, kv_positions: 1-D integers for the local rows and keys, instead of the default positions; used only
            if ``causal``. Given on every rank or on none.
        joint: ``(q, k, v)`` of tokens that every rank holds, the same on each; not counted in lengths and masks.
        joint_position: "front" or "rear" of the sequence. Without causality attention doesn't depend on it.
        joint_key_mask: ``(B, joint keys)`` bool.
        schedule: "auto", "ulysses", "ring" or "hybrid"; see :func:`choose_schedule`.

    Returns:
        ``(B, local rows, H, Dv)`` in q's dtype; with ``joint`` that and ``joint_out`` ``(B, joint rows, H, Dv)``, which
        has the same bits on every rank.

    Raises:
        ConfigError: shapes, dtypes or lengths that don't fit together, or an unknown name.
        UnsupportedError: ``causal`` with ``joint``.
    """
    check_name("layout", layout, LAYOUTS)
    check_name("order", order, partition.ORDERS)
    check_name("joint_position", joint_position, JOINT_POSITIONS)
    if layout == "BNSD":
        q, k, v = _heads_last(q), _heads_last(k), _heads_last(v)
        joint = None if joint is None else (_heads_last(joint[0]), _heads_last(joint[1]), _heads_last(joint[2]))
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
        tokens = Joint(*joint, joint_key_mask, joint_position == "front", *_joint_work(mesh, sharding))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, joint_out = group_attention(q, k, v, sharding=sharding, visible=visible, scale=scale, joint=tokens)
    if layout == "BNSD":
        out, joint_out = _heads_last(out), None if joint_out is None else _heads_last(joint_out)
    return out if joint_out is None else (out, joint_out)


def _heads_last(x: Tensor) -> Tensor:
    """BNSD to BSND and back."""
    return x.transpose(1, 2)


def _joint_work(mesh: ParallelMesh, sharding: Sharding) -> tuple[Axis, range]:
    """The axis that shares the work on the joint queries, and the keys of this rank's block that are its share."""
    if sharding.replicated_kv:
        keys = sum(map(len, sharding.keys[0]))
        return mesh.sequence, partition.split(keys, mesh.sequence.size)[mesh.sequence.rank]
    return sharding.ring, range(sum(map(len, sharding.blocks[sharding.ring.rank])))
