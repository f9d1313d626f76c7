"""The flash-attn package's kernel (arXiv 2307.08691), if it is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.kernels.base import Kernel, Request


def refuses(request: Request) -> str | None:
    if request.device != "cuda":
        return f"needs CUDA, not {request.device}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"has float16 and bfloat16, not {request.dtype}"
    if request.masked:
        return "takes no mask"
    if request.head_dim != request.value_dim or request.head_dim % 8 or request.head_dim > 256:
        return f"needs one head_dim in multiples of 8 up to 256, not {request.head_dim} and {request.value_dim}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out, lse[..., : q.shape[1]].transpose(1, 2)


KERNEL = Kernel("flash_attn", run, refuses)
