"""torch's CUDA kernels, called directly because ``scaled_dot_product_attention`` doesn't return the LSE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.attention.kernels.base import Kernel, Request, additive, repeat_kv

HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Alignment in elements that the efficient kernel needs for a mask's rows."""


def _refuses_cuda(request: Request, head_dim_multiple: int, largest_head_dim: int) -> str | None:
    if request.device != "cuda":
        return f"needs CUDA, not {request.device}"
    if request.head_dim != request.value_dim:
        return f"needs one head_dim, not {request.head_dim} and {request.value_dim}"
    if request.head_dim % head_dim_multiple or request.head_dim > largest_head_dim:
        return f"needs a head_dim in multiples of {head_dim_multiple} up to {largest_head_dim}, not {request.head_dim}"
    return None


def refuses_flash(request: Request) -> str | None:
    if request.dtype not in HALF:
        return f"has float16 and bfloat16, not {request.dtype}"
    if request.masked:
        return "takes no mask"
    return _refuses_cuda(request, 8, 256)


def run_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def refuses_cudnn(request: Request) -> str | None:
    if request.dtype not in HALF:
        return f"has float16 and bfloat16, not {request.dtype}"
    if request.masked:
        return "takes no mask here"
    if request.query_rows == 1 or request.key_rows == 1:
        return "needs more than one row"
    return _refuses_cuda(request, 8, 128)


def run_cudnn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    k, v = repeat_kv(k, q.shape[2]), repeat_kv(v, q.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)


def refuses_efficient(request: Request) -> str | None:
    if request.dtype not in (*HALF, torch.float32):
        return f"has float16, bfloat16 and float32, not {request.dtype}"
    if request.causal and request.masked:
        return "takes a mask or causality, not both"
    return _refuses_cuda(request, 8, 65536)


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


FLASH = Kernel("torch_cuda_flash", run_flash, refuses_flash)
CUDNN = Kernel("torch_cuda_cudnn", run_cudnn, refuses_cudnn)
EFFICIENT = Kernel("torch_cuda_efficient", run_efficient, refuses_efficient)
