"""Padding: the first rank pads above, the last below, with rows that may be on other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from multicard.spatial.rows import FUNCTIONS, Rows, plainly, rule


@rule("constant_pad_nd")
def constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Negative padding takes rows away."""
    x, pad, *value = args
    n = 2 * (x.dim() - 1 - x.held.dim)
    if n >= len(pad):
        return x.like(func(x.local, pad, *value, **kwargs))
    above, below = pad[n], pad[n + 1]
    if x.held.outer != 1:
        return NotImplemented
    if above < 0 or below < 0:
        rows = x.shape[x.held.dim]
        cropped = x[(slice(None),) * x.held.dim + (slice(max(0, -above), rows - max(0, -below)),)]
        pads = [*pad[:n], max(0, above), max(0, below), *pad[n + 2 :]]
        return torch.ops.aten.constant_pad_nd(cropped, pads, *value, **kwargs)
    last = x.ranks.axis.size - 1
    here = [above if x.rank == 0 else 0, below if x.rank == last else 0]
    layout = x.held.cut(_padded(x.held.cuts, above, below))
    return x.like(func(x.local, [*pad[:n], *here, *pad[n + 2 :]], *value, **kwargs), layout)


@rule("reflection_pad2d", "reflection_pad3d", "replication_pad2d", "replication_pad3d")
def mirrored(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows first, then the other dims: they don't depend on each other."""
    x, pad = args
    n = 2 * (x.dim() - 1 - x.held.dim)
    if n >= len(pad):
        return x.like(func(x.local, pad)) if x.local.numel() else x.like(F.pad(x.local, pad))
    if x.held.outer != 1 or min(pad) < 0:
        return NotImplemented
    above, below = pad[n], pad[n + 1]
    others = [*pad[:n], 0, 0, *pad[n + 2 :]]
    if above or below:
        index = torch.arange(x.held.rows, dtype=torch.float64)[None, None]
        mode = "reflect" if "reflection" in func.__name__ else "replicate"
        rows = F.pad(index, (above, below), mode=mode)
        x = x.picked(rows.flatten().long().tolist(), _padded(x.held.cuts, above, below))
    return x.like(func(x.local, others) if x.local.numel() else F.pad(x.local, others))


def circular(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.pad`` that wraps around, which torch writes piece by piece; its other modes are aten operations."""
    x, pad, *given = args
    if kwargs.get("mode", given[0] if given else "") != "circular" or not isinstance(x, Rows):
        return plainly(func, args, kwargs)
    n = 2 * (x.dim() - 1 - x.held.dim)
    if n >= len(pad) or x.held.outer != 1:
        return plainly(func, args, kwargs)
    above, below = pad[n], pad[n + 1]
    rows = [i % x.held.rows for i in range(-above, x.held.rows + below)]
    x = x.picked(rows, _padded(x.held.cuts, above, below))
    others = [*pad[:n], 0, 0, *pad[n + 2 :]]
    return x.like(F.pad(x.local, others, mode="circular" if x.local.numel() else "constant"))


def _padded(cuts: Sequence[int], above: int, below: int) -> list[int]:
    return [0, *(cut + above for cut in cuts[1:-1]), cuts[-1] + above + below]


FUNCTIONS[F.pad] = circular
