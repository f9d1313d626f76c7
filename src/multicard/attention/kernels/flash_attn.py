"""The flash-attn package's kernel (arXiv 2307.08691), if it is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.kernels.base import Kernel, Limits


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out, lse[..., : q.shape[1]].transpose(1, 2)


HALF = (torch.float16, torch.bfloat16)
KERNEL = Kernel("flash_attn", run, Limits("cuda", HALF, masks=False, multiple=8, largest=256))
