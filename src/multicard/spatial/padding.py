"""Padding and interpolation: each row of the result is made of rows that may be on other ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.spatial.layout import inside
from multicard.spatial.rows import FUNCTIONS, Rows, plainly, rule


@rule("constant_pad_nd")
def constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first rank pads above, the last below; negative padding takes rows away."""
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
    cuts = x.held.cuts
    layout = x.held.cut([0, *(cut + above for cut in cuts[1:-1]), cuts[-1] + above + below])
    return x.like(func(x.local, [*pad[:n], *here, *pad[n + 2 :]], *value, **kwargs), layout)


@rule("reflection_pad2d", "reflection_pad3d", "replication_pad2d", "replication_pad3d")
def mirrored(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows first, then the other dims: they don't depend on each other."""
    x, pad = args
    n = 2 * (x.dim() - 1 - x.held.dim)
    if n >= len(pad) or x.held.outer != 1 or min(pad) < 0:
        return x.like(func(x.local, pad)) if n >= len(pad) else NotImplemented
    above, below = pad[n], pad[n + 1]
    others = [*pad[:n], 0, 0, *pad[n + 2 :]]
    if above or below:
        index = torch.arange(x.held.rows, dtype=torch.float32)[None, None]
        mode = "reflect" if "reflection" in func.__name__ else "replicate"
        rows = F.pad(index, (above, below), mode=mode).flatten().long().tolist()
        cuts = x.held.cuts
        x = _gathered_rows(x, rows, [0, *(cut + above for cut in cuts[1:-1]), len(rows)])
    return x.like(func(x.local, others) if x.local.numel() else F.pad(x.local, others))


def circular(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.pad`` that wraps around, which torch writes piece by piece; its other modes are aten operations."""
    x, pad, mode, value = (*args, *("constant", None)[len(args) - 2 :])
    mode, value = kwargs.get("mode", mode), kwargs.get("value", value)
    n = 2 * (x.dim() - 1 - x.held.dim) if isinstance(x, Rows) else 0
    if mode != "circular" or not isinstance(x, Rows) or n >= len(pad) or x.held.outer != 1:
        return plainly(func, args, kwargs)
    above, below = pad[n], pad[n + 1]
    rows = [i % x.held.rows for i in range(-above, x.held.rows + below)]
    x = _gathered_rows(x, rows, [0, *(cut + above for cut in x.held.cuts[1:-1]), len(rows)])
    others = [*pad[:n], 0, 0, *pad[n + 2 :]]
    return x.like(F.pad(x.local, others, mode="circular" if x.local.numel() else "constant"))


def _gathered_rows(x: Rows, rows: list[int], cuts: list[int]) -> Rows:
    """The tensor whose row ``i`` is row ``rows[i]`` of ``x``."""
    layout = x.held.cut(cuts)
    wanted = [[range(rows[i], rows[i] + 1) for i in span] for span in layout.spans]
    return x.like(x.fetch([_runs(each) for each in wanted]).wait(), layout)


def _runs(spans: list[range]) -> list[range]:
    """Adjacent rows as one span."""
    merged: list[range] = []
    for span in spans:
        if merged and merged[-1].stop == span.start:
            merged[-1] = range(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return merged


@rule("upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def nearest(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, size, *scales = args
    n = x.held.dim - 2
    if kwargs or n < 0 or x.held.outer != 1 or func._overloadname == "vec":
        return NotImplemented
    times, torn = divmod(size[n], x.held.rows)
    if not torn:
        here = [*size[:n], times * len(x.held.spans[x.rank]), *size[n + 1 :]]
        layout = x.held.cut([cut * times for cut in x.held.cuts])
        return x.like(_resized(func, x.local, here, scales), layout)
    index = torch.arange(x.held.rows, dtype=torch.float64).view(1, 1, -1, 1)
    plane = torch.ops.aten.upsample_nearest2d if "exact" not in func.__name__ else torch.ops.aten._upsample_nearest_exact2d
    rows = plane(index, [size[n], 1], *([scales[n], None] if scales else [])).flatten().long().tolist()
    x = _gathered_rows(x, rows, _scaled(x, size[n]))
    return x.like(_resized(func, x.local, [*size[:n], x.local.shape[x.held.dim], *size[n + 1 :]], _but(scales, n)))


def _but(scales: list[Any], n: int) -> list[Any]:
    return [None if i == n else scale for i, scale in enumerate(scales)]


def _scaled(x: Rows, rows: int) -> list[int]:
    """The same cuts of more or fewer rows."""
    return [round(cut * rows / x.held.rows) for cut in x.held.cuts]


def _resized(func: Any, local: Tensor, size: list[int], rest: list[Any]) -> Tensor:
    if not local.numel():
        return local.new_empty([*local.shape[: local.dim() - len(size)], *size])
    return func(local, size, *rest)


@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def smooth(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Interpolation is separable: the other dims here, and rows by the matrix that the operation stands for."""
    x, size, corners, *scales = args
    n, dim = x.held.dim - 2, x.held.dim
    if kwargs or n < 0 or x.held.outer != 1 or func._overloadname == "vec":
        return NotImplemented
    here = [*size[:n], x.local.shape[dim], *size[n + 1 :]]
    local = x.local if here == list(x.local.shape[2:]) else _resized(func, x.local, here, [corners, *_but(scales, n)])
    layout = x.held.cut(_scaled(x, size[n]))
    matrix = _matrix(func, x.held.rows, size[n], corners, scales[n] if scales else None)
    spans = []
    for span in layout.spans:
        used = matrix[span.start : span.stop].any(0).nonzero().flatten()
        spans.append([inside(range(int(used[0]), int(used[-1]) + 1), x.held.rows)] if len(used) else [])
    slab = x.like(local).fetch(spans).wait()
    mine, wide = layout.spans[x.rank], torch.promote_types(x.dtype, torch.float32)
    if not mine:
        return x.like(slab.narrow(dim, 0, 0), layout)
    weights = matrix[mine.start : mine.stop, spans[x.rank][0].start : spans[x.rank][0].stop].to(slab.device, wide)
    out = torch.tensordot(slab.to(wide), weights, ([dim], [1])).movedim(-1, dim)
    return x.like(out.to(slab.dtype).contiguous(), layout)


def _matrix(func: Any, rows: int, out: int, corners: bool, scale: float | None) -> Tensor:
    """``(out, rows)``: what the operation does along one dim, float64."""
    plane = torch.ops.aten.upsample_bilinear2d if "linear" in func.__name__ and "aa" not in func.__name__ else func
    unit = torch.eye(rows, dtype=torch.float64).view(1, rows, rows, 1).repeat(1, 1, 1, 2)  # of one column, bicubic with antialias is wrong (torch 2.13)
    return plane(unit, [out, 2], corners, scale, None)[0, :, :, 0].t()


FUNCTIONS[F.pad] = circular
