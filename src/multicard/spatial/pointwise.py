"""Operations on each number by itself: operands are brought to the same rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multicard.spatial.exchange import take
from multicard.spatial.layout import Layout
from multicard.spatial.rows import Rows, rule


@rule("add", "copy_", "where", "lerp", "addcmul", "addcdiv", "nan_to_num", anywhere=True)
def pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operands broadcast from their last dims. Operands with other rows are moved; whole ones are cut."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    rows = [x for x in tensors if isinstance(x, Rows)]
    written = args[0] if func._schema.is_mutable else None
    if not rows or kwargs.get("out") is not None or (written is not None and not isinstance(written, Rows)):
        return NotImplemented
    target = written if written is not None else rows[0] if len(rows) == 1 else max(rows, key=_preference)
    place, layout = target.held.dim - target.dim(), target.held
    size = layout.outer * layout.rows
    if size == 1 and any(x.dim() >= -place and x.shape[place] != 1 for x in tensors):
        return NotImplemented
    if any(x is not target and not _fits(x, place, target) for x in rows):
        return NotImplemented

    def local(value: Any) -> Any:
        return _part(value, place, layout, target.rank) if isinstance(value, Tensor) else value

    out = func(*map(local, args), **{name: local(value) for name, value in kwargs.items()})
    return written if written is not None else target.like(out, layout.at(out.dim() + place))


def _preference(x: Rows) -> tuple[int, int]:
    """Most dims, then the smallest largest part."""
    return x.dim(), -max(x.held.sizes)


def _fits(x: Rows, place: int, target: Rows) -> bool:
    """Whether moving rows makes ``x`` have the target's layout."""
    alike = (x.held.dim - x.dim(), x.held.outer, x.held.rows) == (place, target.held.outer, target.held.rows)
    return alike and x.ranks is target.ranks


def _part(x: Tensor, place: int, layout: Layout, rank: int) -> Tensor:
    if isinstance(x, Rows):
        return x.recut(layout.cuts).local
    if x.dim() < -place or (x.shape[place] == 1 and layout.outer * layout.rows != 1):
        return x
    return take(x, layout.at(x.dim() + place), rank)


@rule(
    *("alias", "detach", "clone", "_to_copy", "lift_fresh", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("fill_", "zero_"),
)
def alike(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations whose result has the operand's shape, of whatever number."""
    x, *others = args
    if any(isinstance(y, Tensor) and y.dim() for y in others):
        return NotImplemented
    out = func(x.local, *others, **kwargs)
    return x if out is x.local else x.like(out)


@rule("new_zeros", "new_ones", "new_empty", "new_full")
def new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor with the same rows is split alike, any other is whole on every rank."""
    x, size, *others = args
    if len(size) != x.dim() or size[x.held.dim] != x.shape[x.held.dim]:
        return func(x.local, size, *others, **kwargs)
    return x.like(func(x.local, x.held.shape(size, x.rank), *others, **kwargs))


@rule("randn_like", "rand_like")
def random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drawn whole on every rank, so that generators are where one process's would be."""
    (x,) = args
    whole = func(x.local.new_empty(x.shape), **kwargs)
    return x.like(take(whole, x.held, x.rank))
