"""torch's CPU flash kernel, which returns the LSE and takes grouped queries and an additive mask.

Its known faults (torch 2.13), each refused here or avoided by the caller: zero-length queries or keys end the process
with SIGFPE; a row masked with -inf everywhere gets LSE 0; bool masks and values of another head_dim raise; an inner
stride other than 1 gives wrong results without an error, and so does a float32 mask of float64 queries; query heads
that aren't a multiple of the key/value heads are accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.kernels.base import Kernel, Limits, additive

FLASH_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEW_ROWS = 16
"""Below this many query rows (decoding) most of the time goes into reading the keys: see :func:`_run_folded`."""


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    few = q.shape[1] < FEW_ROWS
    if q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and few):
        q, k, v = q.float(), k.float(), v.float()  # faster on CPUs without half-precision matrix units
    if few and q.shape[2] > k.shape[2] and not causal:
        return _run_folded(q, k, v, mask, scale)
    return _run(q, k, v, mask, causal, scale)


def _run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        attn_mask=None if mask is None else additive(mask, torch.promote_types(q.dtype, torch.float32)),
        scale=scale,
    )
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def _run_folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Fold query heads that share a key/value head into rows of one head, which then reads keys and values once."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    folded = q.unflatten(2, (kv_heads, group)).transpose(2, 3).flatten(1, 2)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.expand(-1, -1, q.shape[1], -1).unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(2, 3)
    elif mask is not None and mask.shape[2] > 1:
        mask = mask.repeat_interleave(group, 2)
    out, lse = _run(folded, k, v, mask, False, scale)
    out, lse = (x.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3) for x in (out, lse))
    return out, lse


KERNEL = Kernel("torch_cpu_flash", run, Limits("cpu", FLASH_TYPES, causal_masks=True))
