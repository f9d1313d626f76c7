"""``attend``: one exact attention call for every mesh."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.checks import check_name
from multicard.attention.no_backward import inference_only
from multicard.attention.sharded import sharded_attention
from multicard.attention.traced import traced_attention
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
    check_name("joint_position", joint_position, JOINT_POSITIONS)
    if layout == "BNSD":
        q, k, v = _heads_last(q), _heads_last(k), _heads_last(v)
        joint = None if joint is None else (_heads_last(joint[0]), _heads_last(joint[1]), _heads_last(joint[2]))
    attention = traced_attention if torch.compiler.is_compiling() else sharded_attention
    out, *joint_out = attention(
        q,
        k,
        v,
        mesh,
        joint=joint,
        causal=causal,
        key_mask=key_mask,
        mask=mask,
        scale=scale,
        seq_len=seq_len,
        kv_seq_len=kv_seq_len,
        replicated_kv=replicated_kv,
        order=order,
        q_positions=q_positions,
        kv_positions=kv_positions,
        joint_in_front=joint_position == "front",
        joint_key_mask=joint_key_mask,
        schedule=schedule,
    )
    if layout == "BNSD":
        out, joint_out = _heads_last(out), list(map(_heads_last, joint_out))
    return (out, joint_out[0]) if joint_out else out


def _heads_last(x: Tensor) -> Tensor:
    """BNSD to BSND and back."""
    return x.transpose(1, 2)
