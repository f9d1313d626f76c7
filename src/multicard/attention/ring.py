"""Ring attention (arXiv 2310.01889): queries stay, keys and values travel. With one rank it is plain attention."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.rotation import Joint, around
from multicard.attention.segments import Segments
from multicard.attention.visibility import Visibility
from multicard.axis import Axis


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: Axis,
    visible: Visibility,
    segments: Segments,
    scale: float,
    joint: Joint | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of this rank's queries over the keys of all ranks of ``axis``.

    Keys and values go from rank to rank + 1, ``axis.size - 1`` times, the next block in flight while this one is
    computed; at most two blocks besides the caller's own are held. Joint keys are attended to once, with the rank's own
    block; joint queries are computed against that block only, gathered (one all-gather) and merged in rank order.

    Args:
        q: ``(B, rows, H, D)``. k, v: this rank's block, ``(B, keys, Hkv, D)`` and ``(B, keys, Hkv, Dv)``.
        visible: what the rows see of the block of every rank of the axis.

    Returns:
        ``(B, rows, H, Dv)``, and the joint queries' ``(B, Sj, H, Dv)`` or None.
    """
    loop = around
    if axis.size > 1:
        k, v = k.contiguous(), v.contiguous()
        if torch.compiler.is_compiling():
            from multicard.attention import uncompiled

            loop = uncompiled.around
    return loop(q, k, v, axis, visible, segments, scale, joint)
