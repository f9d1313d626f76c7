"""torch's CPU flash kernel: the one that returns the LSE, takes grouped queries and an additive mask.

Traps in it (torch 2.13), each refused here or avoided by the caller: zero-length queries or keys end the process with
SIGFPE; a row masked with -inf everywhere gets LSE 0; bool masks and values of another head_dim raise; an inner stride
other than 1 is read wrongly in silence; query heads that aren't a multiple of the key/value heads are accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.kernels.base import Kernel, Request, additive

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEW_ROWS = 16
"""Below this many query rows bfloat16 matrix products are slower than converting the keys and values."""


def refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return f"needs the CPU, not {request.device}"
    if request.dtype not in DTYPES:
        return f"has no {request.dtype}"
    if request.head_dim != request.value_dim:
        return f"needs one head_dim, not {request.head_dim} and {request.value_dim}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and q.shape[1] < FEW_ROWS):
        q, k, v = q.float(), k.float(), v.float()  # CPUs without half-precision matrix units are faster so
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        attn_mask=None if mask is None else additive(mask),
        scale=scale,
    )
    return out.transpose(1, 2), lse.transpose(1, 2).float()


KERNEL = Kernel("torch_cpu_flash", run, refuses)
