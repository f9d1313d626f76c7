"""Interpolation: each row of the result is made of rows that may be on other ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from multicard.spatial.layout import inside
from multicard.spatial.rows import Rows, rule


@rule("upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def nearest(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By whole numbers locally, otherwise by picking rows."""
    x, size, *scales = args
    n = x.held.dim - 2
    if kwargs or n < 0 or x.held.outer != 1 or str(func).endswith(".vec"):
        return NotImplemented
    times, torn = divmod(size[n], x.held.rows)
    if not torn and (not scales or scales[n] in (None, times)):
        here = [*size[:n], times * len(x.held.spans[x.rank]), *size[n + 1 :]]
        layout = x.held.cut([cut * times for cut in x.held.cuts])
        return x.like(_resized(func, x.local, here, scales), layout)
    index = torch.arange(x.held.rows, dtype=torch.float64).view(1, 1, -1, 1)
    exact = "exact" in func.__name__
    plane = torch.ops.aten._upsample_nearest_exact2d if exact else torch.ops.aten.upsample_nearest2d
    rows = plane(index, [size[n], 1], *([scales[n], None] if scales else [])).flatten().long().tolist()
    x = x.picked(rows, _scaled(x, size[n]))
    return x.like(_resized(func, x.local, [*size[:n], x.local.shape[x.held.dim], *size[n + 1 :]], _but(scales, n)))


def _but(scales: list[Any], n: int) -> list[Any]:
    """The factors of the other dims than that of the rows."""
    return [None if i == n else scale for i, scale in enumerate(scales)]


def _scaled(x: Rows, rows: int) -> list[int]:
    """The same cuts of more or fewer rows."""
    return [round(cut * rows / x.held.rows) for cut in x.held.cuts]


def _resized(func: Any, local: Tensor, size: list[int], rest: list[Any]) -> Tensor:
    """The operation on this rank's rows; torch refuses none."""
    if not local.numel():
        return local.new_empty([*local.shape[: local.dim() - len(size)], *size])
    return func(local, size, *rest)


@rule(
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def smooth(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Interpolation is separable: the other dims here, and rows by the matrix that the operation stands for."""
    x, size, corners, *scales = args
    n, dim = x.held.dim - 2, x.held.dim
    if kwargs or n < 0 or x.held.outer != 1 or str(func).endswith(".vec"):
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


@functools.lru_cache(maxsize=16)
def _matrix(func: Any, rows: int, out: int, corners: bool, scale: float | None) -> Tensor:
    """``(out, rows)``: what the operation does along one dim, float64."""
    plane = torch.ops.aten.upsample_bilinear2d if "linear" in func.__name__ and "aa" not in func.__name__ else func
    unit = torch.eye(rows, dtype=torch.float64).view(1, rows, rows, 1)
    unit = unit.repeat(1, 1, 1, 2)  # of one column, bicubic with antialias is wrong (torch 2.13)
    return plane(unit, [out, 2], corners, scale, None)[0, :, :, 0].t()
