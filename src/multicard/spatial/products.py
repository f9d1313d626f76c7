"""Products of matrices and attention, of which some dim is split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard import collectives
from multicard.attention.attend import attend
from multicard.spatial.exchange import take
from multicard.spatial.layout import Layout, even
from multicard.spatial.rows import FUNCTIONS, Rows, plainly, rule


@rule("mm", "bmm", anywhere=True)
def product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of the left or columns of the right matrix are local; a split inner dim is one all-reduce.

    Where both are split along dims that don't meet, the right one is gathered: keys and values, for attention that is
    written as two products.
    """
    a, b = args
    batch = a.dim() - 2
    rows, inner, columns = batch, batch + 1, batch + 2  # of (batch,) rows, inner, columns
    left = _place(a, (*range(batch), rows, inner))
    right = _place(b, (*range(batch), inner, columns))
    if kwargs or (left is not None and right is not None and left != right):
        b, right = (b.gathered() if isinstance(b, Rows) else b), None
    place, split = (left, a) if left is not None else (right, b)
    assert place is not None
    layout = split.held
    if isinstance(a, Rows) and isinstance(b, Rows) and a.held.outer != b.held.outer:
        return NotImplemented
    x = _local(a, None if place == columns else place, layout, split.rank)
    y = _local(b, None if place == rows else place - (place > rows), layout, split.rank)
    out = func(x, y)
    if place == inner:
        return collectives.all_reduce(out, split.ranks.axis)
    return split.like(out, layout.at(place - (place == columns)))


def _place(x: Tensor, names: tuple[int, ...]) -> int | None:
    return names[x.held.dim] if isinstance(x, Rows) else None


def _local(x: Tensor, dim: int | None, layout: Layout, rank: int) -> Tensor:
    if isinstance(x, Rows):
        return x.recut(layout.cuts).local
    return x if dim is None else take(x, layout.at(dim), rank)


@rule("addmm", "baddbmm", anywhere=True)
def added(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``beta * bias + alpha * (a b)``."""
    bias, a, b = args
    out = torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    out = out if alpha == 1 else out * alpha
    if beta == 0:
        return out
    return torch.add(out, bias, alpha=beta)


def linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.linear`` of rows of features: local, in one step."""
    x, *weights = args
    if not isinstance(x, Rows) or x.held.dim == x.dim() - 1 or any(isinstance(each, Rows) for each in weights):
        return plainly(func, args, kwargs)
    return x.like(func(x.local, *weights, **kwargs))


_plain: Any = F.scaled_dot_product_attention


def attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``scaled_dot_product_attention``: over split tokens by :func:`multicard.attend`; otherwise local, on all keys."""
    with torch._C.DisableTorchFunction():  # what attend makes isn't to be split
        return _attention(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    tokens = query.dim() - 2
    mask = attn_mask.gathered() if isinstance(attn_mask, Rows) else attn_mask
    if not isinstance(query, Rows) or query.held.dim > tokens or dropout_p:
        whole = [x.gathered() if isinstance(x, Rows) else x for x in (query, key, value)]
        next(x for x in (query, key, value) if isinstance(x, Rows)).ranks.whole["scaled_dot_product_attention"] += 1
        return _plain(*whole, mask, dropout_p, is_causal, **options)
    held = query.held
    if held.dim < tokens:  # each sample or head by itself
        parts = [query.local, *(_local(_alike(x, held), held.dim, held, query.rank) for x in (key, value))]
        mask = _cut(mask, held.dim - query.dim(), held, query.rank)
        return query.like(_plain(*parts, mask, is_causal=is_causal, **options))
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if isinstance(key, Rows) and isinstance(value, Rows) and _is_sequence(query, key, value) and not enable_gqa:
        return _over_tokens(query, key, value, mask, scale)
    key, value = (x.gathered() if isinstance(x, Rows) else x for x in (key, value))
    mask = _cut(mask, -2, held, query.rank)
    return query.like(_plain(query.local, key, value, mask, **options))


def _alike(x: Tensor, held: Layout) -> Tensor:
    """``x``, whole unless it is split along the same dim."""
    if not isinstance(x, Rows) or (x.held.dim, x.held.outer, x.held.rows) == (held.dim, held.outer, held.rows):
        return x
    return x.gathered()


def _is_sequence(*tensors: Rows) -> bool:
    """Whether these are ``(batch, heads, tokens, features)`` of which each rank has some tokens."""
    return all(x.dim() == 4 and (x.held.dim, x.held.outer) == (2, 1) for x in tensors)


def _cut(mask: Tensor | None, place: int, held: Layout, rank: int) -> Tensor | None:
    """This rank's part of a whole mask along a dim, counted from the last; one for all stays."""
    if mask is None or mask.dim() < -place or mask.shape[place] == 1:
        return mask
    return take(mask, held.at(mask.dim() + place), rank)


def _over_tokens(q: Rows, k: Rows, v: Rows, mask: Tensor | None, scale: float | None) -> Rows:
    """Every rank has some tokens; ``attend`` wants them split evenly, which moves a few."""
    queries, keys = (even(2, x.held.rows, q.ranks.axis.size) for x in (q, k))
    out = attend(
        q.recut(queries.cuts).local,
        k.recut(keys.cuts).local,
        v.recut(keys.cuts).local,
        mesh=q.ranks.mesh,
        mask=None if mask is None else _cut(_four(mask, q), -2, queries, q.rank),
        scale=scale,
        layout="BNSD",
        seq_len=queries.rows,
        kv_seq_len=keys.rows,
    )
    assert isinstance(out, Tensor)
    return q.like(out, queries).recut(q.held.cuts)


def _four(mask: Tensor, q: Rows) -> Tensor:
    """A mask as attend takes it: four dims, a row for each query."""
    mask = mask.view(*[1] * (4 - mask.dim()), *mask.shape)
    return mask.expand(-1, -1, q.held.rows, -1) if mask.shape[2] == 1 else mask


FUNCTIONS[F.linear] = linear
FUNCTIONS[F.scaled_dot_product_attention] = attention
