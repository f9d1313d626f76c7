"""Attention of a single token, as sums that Inductor compiles to code that reads each key and value once."""

from __future__ import annotations

import torch
from torch import Tensor


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v in float32, for all query heads of a key/value head side by side. To be compiled.

    Args:
        q: ``(1, 1, H, D)``, H a multiple of Hkv.
        k, v: ``(1, n, Hkv, D)``, all visible.

    Returns:
        ``(1, 1, H, D)`` in q's dtype.
    """
    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
    queries = (q.reshape(kv_heads, -1, 1, dim).float() * dim**-0.5).unbind(1)
    keys, values = (x[0].transpose(0, 1).float() for x in (k, v))
    scores = torch.stack([(keys * query).sum(-1) for query in queries])
    weights = scores.softmax(-1).unsqueeze(-1).unbind(0)
    out = torch.stack([(weight * values).sum(1) for weight in weights], 1)
    return out.reshape(1, 1, heads, dim).to(q.dtype)
