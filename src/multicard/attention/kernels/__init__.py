"""Attention over one block of keys, ``(out, lse)``, by the best kernel that supports the call."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.attention.kernels import ascend, flash_attn, reference, torch_cpu, torch_cuda
from multicard.attention.kernels.base import DEAD, Kernel, Request
from multicard.errors import ConfigError

__all__ = ["KERNELS", "Kernel", "Request", "block_attention", "choose"]


def _installed(package: str, kernel: Kernel) -> tuple[Kernel, ...]:
    return (kernel,) if importlib.util.find_spec(package) else ()


KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (torch_cpu.KERNEL,),
    "cuda": (
        *_installed("flash_attn", flash_attn.KERNEL),
        torch_cuda.FLASH,
        torch_cuda.EFFICIENT,
        torch_cuda.CUDNN,
    ),
    "npu": _installed("torch_npu", ascend.KERNEL),
}
"""By type of device, best first. The reference, which refuses nothing, is the last resort."""


def choose(request: Request) -> Kernel:
    """The first kernel for the request's device that doesn't refuse it."""
    for kernel in KERNELS.get(request.device, ()):
        if kernel.refuses(request) is None:
            return kernel
    return reference.KERNEL


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query rows over one block of keys.

    Args:
        q: ``(B, Sq, H, D)``. k: ``(B, Sk, Hkv, D)``, H a multiple of Hkv. v: ``(B, Sk, Hkv, Dv)``. Any strides, any
            length, zero included.
        scale: multiplies the scores.
        causal: row i sees keys 0 to i; needs ``Sq == Sk``.
        mask: ``(B|1, H|1, Sq|1, Sk)``; bool (True = keep) or added to the scores.
        kernel: None: the best one that supports it.

    Returns:
        ``out`` ``(B, Sq, H, Dv)`` in q's dtype or float32, and ``lse`` ``(B, Sq, H)`` in float32. Rows with nothing to
        attend to have out 0 and LSE -inf.

    Raises:
        ConfigError: heads aren't a multiple of key/value heads.
    """
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads over {k.shape[2]} key/value heads: must be a multiple")
    if q.numel() == 0 or k.numel() == 0:
        return (
            q.new_zeros(*q.shape[:3], v.shape[3]),
            torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device),
        )
    value_dim = v.shape[3]
    if scale <= 0:  # a causal kernel may multiply its own -inf by scale: by 0 to NaN, by a negative one to +inf
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    asked, kernel = kernel, kernel or choose(_request(q, k, v, causal, mask is not None))
    if asked is None and kernel is reference.KERNEL:  # try an equivalent call that more kernels support
        q, k, v = _padded(q, k, v)
        if causal and mask is not None:
            causal, mask = False, _folded(mask, q.shape[1])
        kernel = choose(_request(q, k, v, causal, mask is not None))
    out, lse = kernel.run(q, k, v, mask, causal, scale)
    out = out[..., :value_dim]
    return (out, lse) if mask is None else _without_dead_rows(out, lse)


def _request(q: Tensor, k: Tensor, v: Tensor, causal: bool, masked: bool) -> Request:
    return Request(
        q.device.type, q.dtype, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], causal, masked
    )


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad q, k and v with zeros to one head_dim, a multiple of 16: scores don't change; the output is sliced again."""
    width = math.ceil(max(q.shape[3], v.shape[3]) / 16) * 16
    q, k, v = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    return q, k, v


def _folded(mask: Tensor, rows: int) -> Tensor:
    """``mask`` with all keys above the diagonal dropped too."""
    below = torch.ones(rows, rows, dtype=torch.bool, device=mask.device).tril_()
    return mask & below if mask.dtype == torch.bool else mask.masked_fill(~below, -torch.inf)


def _without_dead_rows(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    dead = lse < DEAD
    if out.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():
        return out, lse
    return out.masked_fill(dead.unsqueeze(-1), 0.0), lse.masked_fill(dead, -torch.inf)
