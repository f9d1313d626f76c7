"""Views of a tensor whose rows are split: the layout moves along."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multicard.spatial.exchange import take
from multicard.spatial.layout import Layout, even, inside, reshaped
from multicard.spatial.rows import Rows, rule


@rule("view", "_unsafe_view", "_reshape_alias")
def reshape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, sizes = args[:2]
    if kwargs or not isinstance(sizes, (list, tuple)):
        return NotImplemented
    new = torch.empty(x.shape, device="meta").view(sizes).shape if -1 in sizes else torch.Size(sizes)
    found = reshaped(x.held, x.shape, new)
    if found is None:
        return NotImplemented
    layout, block = found
    x = x.recut(_multiples(x.held, block))
    return x.like(x.local.reshape(layout.shape(new, x.rank)), layout)


def _multiples(layout: Layout, block: int) -> tuple[int, ...]:
    return tuple(min(-(-cut // block) * block, layout.rows) for cut in layout.cuts)


@rule("permute")
def permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dims = args
    dims = [dim % x.dim() for dim in dims]
    return x.like(func(x.local, dims), x.held.at(dims.index(x.held.dim)))


@rule("transpose", "t")
def transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *dims = args
    first, second = (dim % x.dim() for dim in (dims or (0, x.dim() - 1)))
    at = {first: second, second: first}.get(x.held.dim, x.held.dim)
    return x.like(x.local.transpose(first, second), x.held.at(at))


@rule("unsqueeze")
def unsqueeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim = args
    dim = dim % (x.dim() + 1)
    return x.like(func(x.local, dim), x.held.at(x.held.dim + (dim <= x.held.dim)))


@rule("squeeze")
def squeeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *given = args
    dims = given[0] if given else range(x.dim())
    dims = [dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)]
    gone = [dim for dim in dims if x.shape[dim] == 1]
    if x.held.dim in gone:
        return NotImplemented
    return x.like(x.local.squeeze(gone), x.held.at(x.held.dim - sum(dim < x.held.dim for dim in gone)))


@rule("select")
def select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, index = args
    dim %= x.dim()
    if dim == x.held.dim:
        return NotImplemented
    return x.like(func(x.local, dim, index), x.held.at(x.held.dim - (dim < x.held.dim)))


@rule("slice")
def slices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of rows, each rank keeps those that it has."""
    x, *given = args
    defaults: list[Any] = [0, None, None, 1]
    dim, begin, end, every = given + defaults[len(given) :]
    if kwargs or (dim % x.dim() == x.held.dim and x.held.outer != 1):
        return NotImplemented
    if dim % x.dim() != x.held.dim:
        return x.like(func(x.local, *given))
    start, stop, step = slice(begin, end, every).indices(x.shape[dim])
    return _rows(x, start, max(start, stop), step)


def _rows(x: Rows, start: int, stop: int, step: int) -> Rows:
    """Rows ``start`` to ``stop``, every ``step``-th: a view, without communication."""
    count = len(range(start, stop, step))
    cuts = [min(max(-(-(cut - start) // step), 0), count) for cut in x.held.cuts]
    mine = range(cuts[x.rank], cuts[x.rank + 1])
    first = start + mine.start * step - x.held.cuts[x.rank] if mine else 0
    local = x.local[(slice(None),) * x.held.dim + (slice(first, first + len(mine) * step, step),)]
    return x.like(local, x.held.cut([0, *cuts[1:-1], count]))


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")
def splits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *others = args
    unbinds = "unbind" in func.__name__
    dim = kwargs.get("dim", others[-1] if len(others) > (not unbinds) else 0) % x.dim()
    if dim == x.held.dim:
        return NotImplemented
    layout = x.held.at(x.held.dim - 1) if unbinds and dim < x.held.dim else x.held
    return [x.like(each, layout) for each in func(x.local, *others, **kwargs)]


@rule("expand")
def expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, sizes = args[:2]
    at = x.held.dim + len(sizes) - x.dim()
    if sizes[at] not in (-1, x.shape[x.held.dim]):
        return NotImplemented
    return x.like(x.local.expand([*sizes[:at], -1, *sizes[at + 1 :]]), x.held.at(at))


@rule("repeat")
def repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, times = args
    at = x.held.dim + len(times) - x.dim()
    return x.like(func(x.local, times), x.held.at(at)) if times[at] == 1 else NotImplemented


@rule("cat", anywhere=True)
def cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along another dim, tensors are brought to the same rows; along that of the rows, rows are spread anew."""
    tensors, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    tensors = [x for x in tensors if isinstance(x, Rows) or x.dim() > 1 or x.numel()]
    first = min((x for x in tensors if isinstance(x, Rows)), key=lambda x: max(x.held.sizes))
    dim, layout = dim % first.dim(), first.held
    alike = [x for x in tensors if isinstance(x, Rows)]
    if any((x.held.dim, x.held.outer, x.ranks) != (layout.dim, layout.outer, first.ranks) for x in alike):
        return NotImplemented
    if dim == layout.dim:
        return _stacked(tensors, layout, first) if layout.outer == 1 else NotImplemented
    if any(x.held.rows != layout.rows for x in alike):
        return NotImplemented
    parts = [x.recut(layout.cuts).local if isinstance(x, Rows) else take(x, layout, first.rank) for x in tensors]
    return first.like(torch.cat(parts, dim))


def _stacked(tensors: Sequence[Tensor], layout: Layout, like: Rows) -> Rows:
    """Tensors one after the other along their rows, of which each rank gets an even part."""
    ends = list(itertools.accumulate(x.shape[layout.dim] for x in tensors))
    layout = even(layout.dim, ends[-1], like.ranks.axis.size)
    parts = []
    for end, x in zip(ends, tensors, strict=True):
        start, rows = end - x.shape[layout.dim], x.shape[layout.dim]
        wanted = [inside(range(span.start - start, span.stop - start), rows) for span in layout.spans]
        if isinstance(x, Rows):
            parts.append(x.fetch([[span] for span in wanted]).wait())
        else:
            mine = wanted[like.rank]
            parts.append(x.narrow(layout.dim, mine.start, len(mine)))
    return like.like(torch.cat(parts, layout.dim), layout)


@rule("index_select")
def index_select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, index = args
    return x.like(func(x.local, dim, index)) if dim % x.dim() != x.held.dim else NotImplemented


@rule("flip")
def flip(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dims = args
    return NotImplemented if x.held.dim in [d % x.dim() for d in dims] else x.like(func(x.local, dims))


@rule("stack", anywhere=True)
def stack(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As one cat of tensors with a dim more."""
    tensors, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    dim %= tensors[0].dim() + 1
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


@rule("pixel_shuffle", "pixel_unshuffle")
def shuffle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each row becomes some, or some become one."""
    x, factor = args
    if x.held.dim != x.dim() - 2 or x.held.outer != 1:
        return NotImplemented
    shuffles = func.overloadpacket is torch.ops.aten.pixel_shuffle
    x = x if shuffles else x.recut(_multiples(x.held, factor))
    layout = x.held.cut([cut * factor if shuffles else cut // factor for cut in x.held.cuts])
    if x.local.numel():
        return x.like(func(x.local, factor), layout)
    *batch, channels, _, columns = x.local.shape
    shape = (channels // factor**2, 0, columns * factor) if shuffles else (channels * factor**2, 0, columns // factor)
    return x.like(x.local.new_empty((*batch, *shape)), layout)  # torch 2.13 gives a wrong shape for no rows
