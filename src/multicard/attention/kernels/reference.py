"""Attention by the formula in plain torch, for any device and dtype: the reference for all other kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.kernels.base import DEAD, Kernel, additive, repeat_kv


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scale + mask)·v with scores in at least float32 (arXiv 1706.03762). See :class:`Kernel`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, repeat_kv(k, q.shape[2]), repeat_kv(v, q.shape[2])))
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + additive(mask)
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse < DEAD, -torch.inf)
    weights = torch.nan_to_num((scores - lse.unsqueeze(-1)).exp(), nan=0.0, posinf=0.0)
    return (weights @ v).transpose(1, 2), lse.transpose(1, 2).float()


KERNEL = Kernel("reference", run)
