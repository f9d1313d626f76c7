"""Norms over numbers of which other ranks have some."""

from __future__ import annotations

import functools
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
    return _normalized(x, weight, bias, groups, eps)


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
    return _normalized(x, weight, bias, x.shape[1], eps)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape, *_ = args
    if x.held.dim >= x.dim() - len(shape):
        return NotImplemented
    return tuple(x.like(each) for each in func(x.local, *args[1:], **kwargs))


def _normalized(
    x: Rows, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Rows, Tensor, Tensor]:
    """A group norm over the rows of all ranks, and the groups' means and ``1 / sqrt(variance + eps)``.

    Each rank normalizes by its own rows, and then scales and shifts by how its statistics differ from all ranks'.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = x.dtype == wide
    parts = [x.local] if whole else x.local.chunk(math.gcd(groups, 8), 1)  # not all of it in float32 at a time
    normal, *own = _group_norm(parts[0].to(wide), groups // len(parts), eps)
    for part in parts[1:]:
        more = _group_norm(part.to(wide), groups // len(parts), eps)[1:]
        own = [torch.cat(each, 1) for each in zip(own, more, strict=True)]
    mean, rstd = _combined(x, torch.stack(own))
    scale, shift = (rstd / own[1], (own[0] - mean) * rstd) if whole else (rstd, -mean * rstd)
    scale, shift = (each.repeat_interleave(x.shape[1] // groups, 1) for each in (scale, shift))
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    scale, shift = (each.view(*each.shape, *[1] * (x.dim() - 2)) for each in (scale, shift))
    if whole:
        return x.like(torch.addcmul(shift, normal, scale, out=normal)), mean, rstd
    each = zip(shift.chunk(len(parts), 1), parts, scale.chunk(len(parts), 1), strict=True)
    return x.like(torch.cat([torch.addcmul(a, part.to(wide), b).to(x.dtype) for a, part, b in each], 1)), mean, rstd


def _group_norm(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The group norm of one rank's rows, its means and ``1 / sqrt(variance + eps)``, ``(batch, groups)``."""
    if not x.numel():
        return x, x.new_zeros(x.shape[0], groups), x.new_ones(x.shape[0], groups)
    batch, channels = x.shape[:2]
    return torch.native_group_norm(x.contiguous(), None, None, batch, channels, x[0, 0].numel(), groups, eps)


def _combined(x: Rows, own: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' statistics from each rank's. One all-gather of two numbers a group.

    Means and variances are combined (Chan, Golub and LeVeque 1979), so no large sums are subtracted.
    """
    means, rstds = collectives.all_gather(own.unsqueeze(0), x.ranks.axis).unbind(1)
    shares = _shares(x.held.sizes, own.dtype, own.device)
    mean = (shares * means).sum(0)
    variance = (shares * (rstds.square().reciprocal() + (means - mean).square())).sum(0)  # with eps in it
    return mean, torch.rsqrt(variance)


@functools.lru_cache(maxsize=64)
def _shares(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of all rows those that each rank has, ``(ranks, 1, 1)``; kept, since copies to a card make it wait."""
    return torch.tensor([size / sum(sizes) for size in sizes], dtype=dtype, device=device).view(-1, 1, 1)
