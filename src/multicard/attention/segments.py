"""Query heads that aren't spread evenly over key/value heads, as a few grouped-query calls, each of them even."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Segments = Sequence[tuple[range, range]]
"""(query heads, key/value heads) of each call, in local numbers: see ``partition.HeadShard``."""


def by_segment(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_dim: int = 2,
) -> Tensor:
    """``attend(q, k, v)`` of each segment's heads, concatenated along the heads of q.

    Args:
        q: ``(B, tokens, heads, ...)``, like the result of ``attend``.
        k, v: their heads are in dimension ``kv_dim``.
    """
    if len(segments) == 1:
        return attend(q, k, v)
    outs = []
    for query, kv in segments:
        keys, values = (x.narrow(kv_dim, kv.start, len(kv)) for x in (k, v))
        outs.append(attend(q[:, :, query.start : query.stop], keys, values))
    return torch.cat(outs, 2)
