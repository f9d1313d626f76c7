"""Sums, means and the like: over other dims they are local, over rows the ranks combine theirs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multicard import collectives
from multicard.spatial.rows import Rows, rule


@rule(
    *("sum", "mean", "amax", "amin", "any", "all", "linalg_vector_norm", "max", "min", "argmax", "argmin"),
    *("var", "std", "var_mean", "std_mean", "prod", "logsumexp"),
)
def reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, dims = args[0], given.get("dim")
    if isinstance(given.get("other"), Tensor):  # torch.max of two tensors
        return NotImplemented
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    dims = [dim % x.dim() for dim in dims]
    if x.held.dim in dims:
        return _over_rows(func.overloadpacket.__name__, x, dims, given)
    gone = 0 if given.get("keepdim") else sum(dim < x.held.dim for dim in dims)
    out = func(x.local, *args[1:], **kwargs)
    layout = x.held.at(x.held.dim - gone)
    return x.like(out, layout) if isinstance(out, Tensor) else tuple(x.like(each, layout) for each in out)


def _over_rows(name: str, x: Rows, dims: list[int], given: dict[str, Any]) -> Any:
    """The result is whole on every rank. One all-reduce."""
    keep, axis, dtype = bool(given.get("keepdim")), x.ranks.axis, given.get("dtype") or x.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if name in ("sum", "mean") and dtype.is_floating_point:
        total = collectives.all_reduce(x.local.sum(dims, keep, dtype=wide), axis)
        count = math.prod(x.shape[dim] for dim in dims)
        return (total / count if name == "mean" else total).to(dtype)
    if name == "linalg_vector_norm" and given.get("ord", 2) == 2:
        squares = x.local.to(wide).square().sum(dims, keep)
        return collectives.all_reduce(squares, axis).sqrt().to(dtype)
    if name in ("amax", "amin") and x.is_floating_point():
        worst = float("-inf") if name == "amax" else float("inf")
        own = getattr(x.local, name)(dims, keep) if x.local.numel() else _filled(x, dims, keep, worst)
        return collectives.all_reduce(own, axis, name[1:])
    if name in ("any", "all"):
        own = x.local.bool() if name == "any" else ~x.local.bool()
        found = collectives.all_reduce(own.sum(dims, keep).float(), axis)
        return found > 0 if name == "any" else found == 0
    return NotImplemented


def _filled(x: Rows, dims: list[int], keep: bool, value: float) -> Tensor:
    shape = [1 if dim in dims else size for dim, size in enumerate(x.shape) if keep or dim not in dims]
    return x.local.new_full(shape, value)


@rule("_softmax", "_log_softmax", "cumsum", "glu", "sort", "topk", "cumprod", "logcumsumexp", "_safe_softmax")
def along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along another dim than that of the rows, locally."""
    x = args[0]
    names = [argument.name for argument in func._schema.arguments]
    dim = {**dict(zip(names, args, strict=False)), **kwargs}.get("dim", -1)
    if dim % x.dim() == x.held.dim:
        return NotImplemented
    out = func(x.local, *args[1:], **kwargs)
    return x.like(out) if isinstance(out, Tensor) else tuple(map(x.like, out))
