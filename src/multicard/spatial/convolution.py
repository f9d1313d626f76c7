"""Convolutions and poolings over rows: the padding of a rank's rows is its neighbours' rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.spatial.layout import TransposedWindow, Window, inside
from multicard.spatial.rows import Rows, rule

Step = Callable[[Tensor, int], Tensor]
"""The operation on a slab of rows, given how many rows of zeros it adds at either end."""


@rule("convolution")
def convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if isinstance(weight, Rows):
        return NotImplemented
    if x.held.dim == 0:
        return _by_sample(func, args)
    n = x.held.dim - 2
    if n < 0 or x.held.outer != 1:
        return NotImplemented
    stride, padding, dilation, output_padding = (
        list(each) if len(each) > 1 else list(each) * (x.dim() - 2)  # one number is meant for all dims
        for each in (stride, padding, dilation, output_padding)
    )
    at = (weight.shape[2 + n], stride[n], padding[n], dilation[n])

    def step(slab: Tensor, rows: int) -> Tensor:
        pads = [*padding[:n], rows, *padding[n + 1 :]]
        return func(slab, weight, bias, stride, pads, dilation, transposed, output_padding, groups)

    if transposed:
        if output_padding[n] or at[0] < at[1]:
            return NotImplemented
        return _transposed(x, TransposedWindow(*at), step)
    return _slide(x, Window(*at), step)


def _by_sample(func: Any, args: tuple[Any, ...]) -> Any:
    """The result where samples are split: local; some kernels refuse none."""
    x = args[0]
    if len(x.local):
        return x.like(func(x.local, *args[1:]))
    shape = func(torch.empty(x.shape, device="meta", dtype=x.dtype), *map(_meta, args[1:])).shape
    return x.like(x.local.new_empty(x.held.shape(shape, x.rank)))


def _meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _slide(x: Rows, window: Window, step: Step) -> Rows:
    """The result's rows that a rank can compute alone it computes while its neighbours' rows are under way."""
    layout, rank = x.held, x.rank
    out = layout.cut(window.cuts(layout.cuts))
    reads = [window.reads(span) for span in out.spans]
    mine, needed, have = out.spans[rank], reads[rank], layout.spans[rank]
    missing = [
        [inside(range(read.start, span.start), layout.rows), inside(range(span.stop, read.stop), layout.rows)]
        if read
        else []
        for read, span in zip(reads, layout.spans, strict=True)
    ]
    fetch = x.fetch(missing)
    if not mine:
        fetch.wait()
        return x.like(_no_rows(x, step, window), out)
    above, below = have.start - needed.start, needed.stop - have.stop
    top = -(-max(0, above) // window.stride) if have.start else 0  # rows of the result that read from ranks above
    bottom = -(-max(0, below) // window.stride) if have.stop < layout.rows else 0
    if not have or top + bottom >= len(mine):
        slab = _slab(x, fetch.wait(), needed, missing[rank])
        return x.like(step(slab, 0), out)
    pad = max(above, below, 0)  # rows of zeros at both ends
    pad += (above - pad) % window.stride  # so that a row of the result reads from ``needed.start`` on
    result = step(x.local, pad).narrow(layout.dim, (pad - above) // window.stride, len(mine))
    fetched = fetch.wait()
    if top:
        _mend(x, window, step, result, range(mine.start, mine.start + top), 0, fetched, missing[rank])
    if bottom:
        _mend(x, window, step, result, range(mine.stop - bottom, mine.stop), len(mine) - bottom, fetched, missing[rank])
    return x.like(result, out)


def _mend(
    x: Rows, window: Window, step: Step, result: Tensor, rows: range, at: int, fetched: Tensor, missing: Sequence[range]
) -> None:
    """Compute those rows of the result that read other ranks' rows."""
    slab = _slab(x, fetched, window.reads(rows), missing)
    result.narrow(x.held.dim, at, len(rows)).copy_(step(slab, 0))


def _slab(x: Rows, fetched: Tensor, needed: range, missing: Sequence[range]) -> Tensor:
    """The needed rows: own ones, fetched ones before and after them, and zeros outside of the tensor."""
    dim, rows = x.held.dim, inside(needed, x.held.rows)
    before, after = fetched.split([len(span) for span in missing], dim)
    parts = []
    for part, span in ((before, missing[0]), (x.local, x.held.spans[x.rank]), (after, missing[1])):
        start, stop = max(span.start, rows.start), min(span.stop, rows.stop)
        if stop > start:
            parts.append(part.narrow(dim, start - span.start, stop - start))
    slab = parts[0] if len(parts) == 1 else torch.cat(parts or [before], dim)
    low = max(0, min(needed.stop, 0) - needed.start)
    high = len(needed) - low - len(rows)
    return F.pad(slab, [*[0, 0] * (x.dim() - 1 - dim), low, high]) if low or high else slab


def _no_rows(x: Rows, step: Step, window: Window) -> Tensor:
    """An empty result of the right shape."""
    shape = list(x.local.shape)
    shape[x.held.dim] = window.extent
    return step(x.local.new_zeros(shape), 0).narrow(x.held.dim, 0, 0)


def _transposed(x: Rows, window: TransposedWindow, step: Step) -> Rows:
    """Each rank computes what its rows and those of its neighbours add to its part."""
    layout, dim = x.held, x.held.dim
    out = layout.cut(window.cuts(layout.cuts))
    reads = [inside(window.reads(span), layout.rows) for span in out.spans]
    slab = x.fetch([[read] for read in reads]).wait()
    mine, read = out.spans[x.rank], reads[x.rank]
    if not read:
        slab = x.local.new_zeros([*slab.shape[:dim], 1, *slab.shape[dim + 1 :]])
    whole = step(slab, 0)  # its first row is row read.start * stride - padding of the result
    first = mine.start - (read.start * window.stride - window.padding) if mine else 0
    return x.like(whole.narrow(dim, first, len(mine)), out)


@rule("avg_pool2d", "avg_pool3d")
def average(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, kernel, stride, padding, ceil_mode = (*args, *([], 0, False)[len(args) - 2 :])[:5]
    if x.held.dim == 0 and x.dim() == len(kernel) + 2:
        return _by_sample(func, args)
    n = x.held.dim - x.dim() + len(kernel)
    if n < 0 or kwargs or ceil_mode or x.held.outer != 1 or len(args) > 5 or any(_all(padding)):
        return NotImplemented

    def step(slab: Tensor, rows: int) -> Tensor:
        return func(F.pad(slab, [*[0, 0] * (x.dim() - 1 - x.held.dim), rows, rows]) if rows else slab, *args[1:])

    return _slide(x, Window(kernel[n], _all(stride or kernel)[n], 0, 1), step)


def _all(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
