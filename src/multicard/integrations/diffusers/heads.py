"""Which attention heads each rank computes in a ``diffusers`` attention, and setting its head counts to them."""

from __future__ import annotations

from typing import Any

from torch import nn

from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.heads import Heads
from multicard.integrations.linears import check_linear

TO_HEADS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def read_heads(attention: Any, axis: Axis, path: str) -> Heads:
    """The heads of an attention module, split over ``axis``. It must have as many key/value heads as query heads.

    Raises:
        UnsupportedError: it doesn't, or a rank would have no head.
    """
    heads = attention.heads
    widths = {name: check_linear(getattr(attention, name), f"{path}.{name}")[1] for name in projections(attention)}
    if len(set(widths.values())) > 1:
        raise UnsupportedError(
            f"{path}: projections of different widths ({widths}), as with fewer key/value heads than query heads, "
            "aren't covered by tensor parallelism; use ulysses or ring"
        )
    if axis.size > heads:
        raise UnsupportedError(f"{path}: tp={axis.size} over {heads} heads: each rank needs one; use tp={heads}")
    return Heads.split(heads, heads, axis)


def localize(attention: Any, heads: Heads) -> None:
    """Set the numbers that processors read to those of this rank's heads."""
    mine = len(heads.mine.query)
    attention.heads = mine
    for name in ("inner_dim", "inner_kv_dim"):
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) // heads.query * mine)


def projections(attention: nn.Module) -> list[str]:
    """The names of the attention's projections to heads."""
    return [name for name in TO_HEADS if getattr(attention, name, None) is not None]
