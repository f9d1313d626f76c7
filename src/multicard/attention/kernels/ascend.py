"""Ascend's fused attention, ``torch_npu.npu_fusion_attention``: the softmax's maximum and sum give the LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.kernels.base import DEAD, Kernel, Limits, repeat_kv

LEFT_UP_CAUSAL = 2
"""``sparse_mode`` for a causal square; it reads a compressed 2048 x 2048 triangle."""
COMPRESSED = 2048


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    import torch_npu

    heads = q.shape[2]
    options: dict = {}
    if causal:
        triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=q.device).triu(1)
        options = {"atten_mask": triangle, "sparse_mode": LEFT_UP_CAUSAL}
    elif mask is not None:
        options = _mask_options(mask, q, k)
        k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    out, highest, total, *_ = torch_npu.npu_fusion_attention(q, k, v, heads, "BSND", scale=scale, **options)
    lse = (highest[..., 0] + total[..., 0].log()).float()  # (B, H, Sq, 8): eight copies of each number
    if mask is not None:
        lse = lse.masked_fill(options["atten_mask"].all(-1), -torch.inf)
    return out, lse.transpose(1, 2)


def _mask_options(mask: Tensor, q: Tensor, k: Tensor) -> dict:
    """The mask for the kernel: ``atten_mask`` is True where a score is dropped; ``pse`` is added to the others."""
    shape = (q.shape[0], 1 if mask.shape[1] == 1 else q.shape[2], q.shape[1], k.shape[1])
    if mask.dtype == torch.bool:
        return {"atten_mask": (~mask).expand(shape).contiguous()}
    dropped = mask < DEAD
    kept = mask.masked_fill(dropped, 0.0).to(q.dtype)
    return {
        "atten_mask": dropped.expand(shape).contiguous(),
        "pse": kept.expand(shape[0], q.shape[2], *shape[2:]).contiguous(),
    }


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL = Kernel("ascend_fusion", run, Limits("npu", DTYPES, multiple=16, largest=512))
