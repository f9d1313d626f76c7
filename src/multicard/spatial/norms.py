"""Norms over numbers of which other ranks have some."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multicard import collectives
from multicard.spatial.rows import Rows, rule


@rule("native_group_norm")
def group_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over all rows: one all-gather of two numbers a group."""
    x, weight, bias, *_, groups, eps = args
    if x.held.dim == 0:
        samples = x.held.outer * len(x.held.spans[x.rank])
        out = func(x.local.contiguous(), weight, bias, samples, *args[4:]) if samples else (x.local, None, None)
        return x.like(out[0]), None, None
    if x.held.dim == 1 or kwargs:
        return NotImplemented
    mean, rstd = _statistics(x, groups, eps)
    return x.like(_scaled(x.local, mean, rstd, weight, bias)), mean, rstd


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_native_batch_norm_legit")
def batch_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With the statistics that it has, locally; by its own (an instance norm), as groups of one channel."""
    x, weight, bias, *_, eps = args
    training = "no_training" not in func.__name__ and args[5 if isinstance(args[5], bool) else 3]
    if x.held.dim == 1 or kwargs:
        return NotImplemented
    if not training:
        out, *statistics = func(x.local, *args[1:])
        return (x.like(out), *statistics)
    if x.held.dim == 0 or x.shape[0] != 1 or (args[3] is not None and not isinstance(args[3], bool)):
        return NotImplemented
    mean, rstd = _statistics(x, x.shape[1], eps)
    return x.like(_scaled(x.local, mean, rstd, weight, bias)), mean, rstd


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape, *_ = args
    if x.held.dim >= x.dim() - len(shape):
        return NotImplemented
    return tuple(x.like(each) for each in func(x.local, *args[1:], **kwargs))


def _statistics(x: Rows, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` of each group of channels, ``(batch, groups)`` in float32 at least.

    The ranks' means and variances are combined (Chan, Golub and LeVeque 1979): no difference of large sums is taken.
    """
    local = x.local.unflatten(1, (groups, x.shape[1] // groups))
    wide = torch.promote_types(x.dtype, torch.float32)
    own = torch.zeros(2, local.shape[0], groups, dtype=wide, device=local.device)
    for i, sample in enumerate(local.unbind(0) if local.numel() else ()):
        own[1, i], own[0, i] = torch.var_mean(sample.to(wide), tuple(range(1, sample.dim())), correction=0)
    both = collectives.all_gather(own.unsqueeze(0), x.ranks.axis)
    shares = torch.tensor([size / x.held.rows for size in x.held.sizes], dtype=wide, device=own.device).view(-1, 1, 1)
    means, variances = both.unbind(1)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return mean, torch.rsqrt(variance + eps)


def _scaled(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * rstd * weight + bias``, one number each a channel."""
    each = x.shape[1] // mean.shape[1]
    scale = rstd.repeat_interleave(each, 1)
    if weight is not None:
        scale = scale * weight
    shift = -mean.repeat_interleave(each, 1) * scale
    if bias is not None:
        shift = shift + bias
    places = (*scale.shape, *[1] * (x.dim() - 2))
    scale, shift = scale.view(places), shift.view(places)
    last = x.dim() == 4 and x.stride(0) == math.prod(x.shape[1:]) and x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)  # as torch's own
    if x.dtype == scale.dtype:
        return torch.addcmul(shift, x, scale, out=out)
    for i in range(len(x)):  # not all of it in float32 at a time
        out[i] = torch.addcmul(shift[i], x[i].to(scale.dtype), scale[i])
    return out
