"""Attention over a sharded sequence as one operator of torch, which ``torch.compile`` keeps in its graph.

Its messages, and the pieces that it computes, depend on lengths; so while compiling only its result's shape is known.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from multicard.attention.sharded import sharded_attention
from multicard.axis import Axis
from multicard.backends.traced import group_of
from multicard.mesh import ParallelMesh, single

AXES = ("ring", "ulysses", "sequence")
MASKS = ("key_mask", "mask", "q_positions", "kv_positions", "joint_key_mask")


def traced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: ParallelMesh,
    *,
    joint: tuple[Tensor, Tensor, Tensor] | None,
    **options: Any,
) -> list[Tensor]:
    """:func:`~multicard.attention.sharded.sharded_attention`, for a function that is being compiled."""
    groups = [axis.group.group_name if axis.group else "" for axis in (mesh.ring, mesh.ulysses, mesh.sequence)]
    masks = [options.pop(name) for name in MASKS]
    found: list[Tensor] = _attention(q, k, v, list(joint or ()), *masks, groups, **options)
    return found


@torch.library.custom_op(
    "multicard::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] joint, Tensor? key_mask, Tensor? mask, Tensor? q_positions, "
    "Tensor? kv_positions, Tensor? joint_key_mask, str[] groups, *, bool causal, float? scale, SymInt? seq_len, "
    "SymInt? kv_seq_len, bool replicated_kv, str order, bool joint_in_front, str schedule) -> Tensor[]",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, joint: list[Tensor], *others: Any, **options: Any) -> list[Tensor]:
    *masks, groups = others
    axes: Any = {name: _axis(name, group) for name, group in zip(AXES, groups, strict=True)}
    mesh, tokens = dataclasses.replace(single(q.device), **axes), tuple(joint) or None
    options |= zip(MASKS, masks, strict=True)
    return [out.contiguous() for out in sharded_attention(q, k, v, mesh, joint=tokens, **options)]  # type: ignore[arg-type]


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, joint: list[Tensor], *others: Any, **options: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:3], v.shape[3]) for x in (q, *joint[:1])]


def _axis(name: str, group: str) -> Axis:
    if not group:
        return Axis(name, 0, 1)
    found = group_of(group)
    return Axis(name, found.rank(), found.size(), found)
