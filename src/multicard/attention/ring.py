"""Ring attention (arXiv 2310.01889): queries stay; keys and values are sent around. With one rank, plain attention."""

from __future__ import annotations

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

    Keys and values are sent from rank to rank + 1, ``axis.size - 1`` times; the next block is in flight while the
    current one is computed, so there are at most two blocks besides the caller's. Joint keys are computed once, with
    the rank's own block; joint queries are computed against that block only, gathered (one all-gather) and merged in
    rank order.

    Args:
        q: ``(B, rows, H, D)``. k, v: this rank's block, ``(B, keys, Hkv, D)`` and ``(B, keys, Hkv, Dv)``.
        visible: which keys of the axis's ranks' blocks the rows see.

    Returns:
        ``(B, rows, H, Dv)``, and the joint queries' ``(B, Sj, H, Dv)`` or None.
    """
    if axis.size > 1:
        k, v = k.contiguous(), v.contiguous()
    return around(q, k, v, axis, visible, segments, scale, joint)
