"""Layers whose weights are split over another axis (tp): each rank computes with the rows that it has."""

from __future__ import annotations

from typing import Any

import torch

from multicard import collectives
from multicard.spatial.rows import FUNCTIONS, RULES, Rows, plainly


def all_reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over the other axis, of the rows that its ranks have in common."""
    x, *others = args
    return x.like(func(x.local, *others, **kwargs)) if isinstance(x, Rows) else plainly(func, args, kwargs)


def all_gather(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same; along the rows' own dim, of whole tensors."""
    x, axis, dim, *sizes = args
    if not isinstance(x, Rows) or dim % x.dim() == x.held.dim:
        whole = x.gathered() if isinstance(x, Rows) else x
        return plainly(func, (whole, axis, dim, *sizes), kwargs)
    return x.like(func(x.local, axis, dim, *sizes, **kwargs))


def reordered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product with a weight in oneDNN's own order."""
    x, weight, *others = args
    if not isinstance(x, Rows) or x.held.dim == x.dim() - 1:
        return NotImplemented
    if not x.local.numel():
        return x.like(x.local.new_empty(*x.local.shape[:-1], weight.shape[0]))
    return x.like(func(x.local, weight, *others, **kwargs))


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    RULES[torch.ops.mkldnn._linear_pointwise] = reordered
FUNCTIONS[collectives.all_reduce] = all_reduce
FUNCTIONS[collectives.all_gather] = all_gather
