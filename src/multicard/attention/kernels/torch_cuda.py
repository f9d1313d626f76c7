"""torch's CUDA kernels, called directly because ``scaled_dot_product_attention`` doesn't return the LSE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.attention.kernels.base import Kernel, Limits, additive, repeat_kv

HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Alignment in elements that the efficient kernel needs for a mask's rows."""


def run_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def run_cudnn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    k, v = repeat_kv(k, q.shape[2]), repeat_kv(v, q.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)


def run_efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads = q.shape[1], q.shape[2]
    k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    bias = None if mask is None else _aligned(additive(mask, q.dtype)).expand(q.shape[0], heads, rows, k.shape[1])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse[..., :rows].transpose(1, 2)  # its LSE is padded to whole tiles


def _aligned(bias: Tensor) -> Tensor:
    columns = bias.shape[-1]
    return F.pad(bias, (0, -columns % ALIGNMENT))[..., :columns]


FLASH = Kernel("torch_cuda_flash", run_flash, Limits("cuda", HALF, masks=False, multiple=8, largest=256))
CUDNN = Kernel(
    "torch_cuda_cudnn", run_cudnn, Limits("cuda", HALF, masks=False, single_rows=False, multiple=8, largest=128)
)
EFFICIENT = Kernel(
    "torch_cuda_efficient", run_efficient, Limits("cuda", (*HALF, torch.float32), multiple=8, largest=1 << 16)
)
