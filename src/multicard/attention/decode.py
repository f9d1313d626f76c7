"""Decoding over a key/value cache that is sharded over ranks by position."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.attention.checks import check_key_mask, check_mask, check_tensors
from multicard.attention.kernels import block_attention
from multicard.attention.merge import merge_ranks
from multicard.attention.no_backward import inference_only
from multicard.attention.visibility import both
from multicard.axis import Axis
from multicard.errors import ConfigError


@inference_only
def attend_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: Axis,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of a few new tokens over a cache that is sharded over the ranks of ``axis``.

    Each rank attends to its own part; outputs and log-sum-exps are gathered and merged in rank order (one all-gather of
    ``B·T·H·(Dv + 1)`` float32 a rank), so the result has the same bits on every rank. Works with any number of heads
    and key/value heads, independently of tensor parallel.

    Args:
        q: ``(B, T, H, D)``, the same on every rank of the axis.
        k, v: ``(B, n, Hkv, D)`` and ``(B, n, Hkv, Dv)``, this rank's part; n may be anything, also zero.
        kv_lengths: ``(B,)`` integers: how many of this rank's keys are in use; None: all.
        key_mask: ``(B, n)`` bool, True = may be attended to.
        mask: ``(B|1, H|1, T|1, n)`` bool or additive, for masks that differ between the new tokens (as causality does).
        scale: None means ``1/√D``.

    Returns:
        ``(B, T, H, Dv)`` in q's dtype. Rows with nothing to attend to on any rank give zeros.

    Raises:
        ConfigError: shapes or dtypes that don't fit together.
    """
    check_tensors(q, k, v)
    if kv_lengths is not None and (kv_lengths.shape != q.shape[:1] or kv_lengths.is_floating_point()):
        raise ConfigError(f"kv_lengths has shape {tuple(kv_lengths.shape)}: must be integers ({q.shape[0]},)")
    if key_mask is not None:
        check_key_mask("key_mask", key_mask, k)
    if mask is not None:
        check_mask("mask", mask, q, k.shape[1], "(batch|1, heads|1, new tokens|1, this rank's keys)")
    keep = None if key_mask is None else key_mask[:, None, None, :]
    if kv_lengths is not None:
        used = torch.arange(k.shape[1], device=k.device) < kv_lengths.to(k.device)[:, None]
        keep = both(used[:, None, None, :], keep)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = block_attention(q, k, v, scale=scale, mask=both(mask, keep))
    return merge_ranks(out, lse, axis).to(q.dtype)
