"""What each style of a tensor plan does to a module of any library.

A style checks its module and returns a change, which is made once everything has been checked. Every new parameter has
its shard rule, so the same change works for a model in memory and for one on the meta device whose weights are read
from files afterwards.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.adapters import base_of, is_adapter
from multicard.integrations.heads import Heads
from multicard.integrations.linears import check_linear, column_parallel, row_parallel
from multicard.integrations.seams import Hooks
from multicard.layers import ColumnParallelLinear, RowParallelLinear, Shard
from multicard.layers.shard import Shares, Spans, cut, halves, sharded

Change = Callable[[], object]
"""A step that changes a model."""


@dataclasses.dataclass(frozen=True)
class Context:
    """A style's arguments besides its module.

    Attributes:
        model: the model that the module belongs to.
        path: of the module, or of a parameter with a style of its own.
        axis: the ranks.
        hooks: the hooks that the split relies on; styles add theirs.
        heads_by_path: the heads of the model's attentions.
        places: the owners and names of each module of the model; a module may have several.
    """

    model: nn.Module
    path: str
    axis: Axis
    hooks: Hooks
    heads_by_path: Mapping[str, Heads]
    places: Mapping[nn.Module, Sequence[tuple[nn.Module, str]]]

    @property
    def heads(self) -> Heads:
        """The heads of the attention that holds the module, or of the nearest one (BERT's output projection).

        Raises:
            UnsupportedError: the plan splits no attention.
        """
        parent = self.path
        while parent:
            parent = parent.rpartition(".")[0]
            for owner, heads in self.heads_by_path.items():
                if not parent or owner == parent or owner.startswith(f"{parent}."):
                    return heads
        raise UnsupportedError(f"the plan splits {self.path} by heads, but there is no query projection near it")


Style = Callable[[nn.Module, Context], Change]


def column(module: nn.Module, context: Context) -> Change:
    """Split output features evenly."""
    return replaced_by_column(module, context, None)


def gate_up(module: nn.Module, context: Context) -> Change:
    """Split two fused projections, [gate | up], each by its output features."""
    _, width = check_linear(module, context.path)
    return replaced_by_column(module, context, halves(width, context.axis.size))


def row(module: nn.Module, context: Context) -> Change:
    """Split input features evenly; the products are summed over ranks."""
    return replaced_by_row(module, context, None)


def to_heads(style: str) -> Style:
    """Split output features by heads; ``style`` says of which heads and in which layout (see ``Heads.shares``)."""

    def by_heads(module: nn.Module, context: Context) -> Change:
        _, width = check_linear(module, context.path)
        return replaced_by_column(module, context, context.heads.shares(style, width, context.path))

    return by_heads


def attention_out(module: nn.Module, context: Context) -> Change:
    """Split input features by query head; the products are summed over ranks. A rank without a head adds zeros."""
    width, _ = check_linear(module, context.path)
    heads = context.heads
    idle_width = width // heads.query if heads.idle else 0
    return replaced_by_row(module, context, heads.output_shares(width), idle_width)


def parameter_by_heads(style: str) -> Style:
    """A parameter with entries for every head of this ``style`` along its first dimension."""

    def by_heads(module: nn.Module, context: Context) -> Change:
        name = context.path.rpartition(".")[2]
        rows = module.get_parameter(name).shape[0]
        mine = context.heads.shares(style, rows, context.path)[context.axis.rank]
        return lambda: cut_parameter(module, name, 0, mine)

    return by_heads


def whole(module: nn.Module, context: Context) -> Change:
    """Leave whole on every rank."""
    return lambda: None


STYLES: dict[str, Style] = {
    "column": column,
    "row": row,
    "gate_up": gate_up,
    "query": to_heads("query"),
    "key_value": to_heads("key_value"),
    "qkv": to_heads("qkv"),
    "qkv_groups": to_heads("qkv_groups"),
    "attention_out": attention_out,
    "heads": parameter_by_heads("query"),
    "key_value_heads": parameter_by_heads("key_value"),
    "whole": whole,
}
"""Styles of both libraries' plans; each library has further styles of its own."""

OF_PARAMETERS = ("heads", "key_value_heads", "whole")
"""Styles that split a single parameter."""


def changes(
    model: nn.Module,
    plan: Mapping[str, str],
    styles: Mapping[str, Style],
    axis: Axis,
    hooks: Hooks,
    heads: Mapping[str, Heads],
) -> list[Change]:
    """The changes that split ``model``: everything is checked, nothing is changed yet.

    Args:
        plan: the style of each module and parameter, by path.
        styles: the functions of the plan's styles.
        axis: the ranks that share each module.
        hooks: the hooks that the split relies on; styles add theirs.
        heads: the heads of the model's attentions, by path.

    Raises:
        UnsupportedError: a module that can't be split exactly in this way; the message names it.
    """
    found, places = [], places_in(model)
    for path, style in plan.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if name not in module._parameters:
            module = model.get_submodule(path)
        elif style not in OF_PARAMETERS:
            raise UnsupportedError(f"{path} is a parameter, which can't be split by {style!r}: pass plan=")
        found.append(styles[style](module, Context(model, path, axis, hooks, heads, places)))
    return found


def make(changes: Iterable[Change]) -> None:
    """Make all changes. Each is dropped once it is made, which frees the whole module that it has replaced."""
    left = collections.deque(changes)
    while left:
        left.popleft()()


# What changes are made of


def replaced_by_column(module: nn.Module, context: Context, shares: Shares | None) -> Change:
    """A column-parallel layer in the module's place."""
    check_linear(module, context.path)
    return lambda: replace_linear(
        module, column_parallel(base_of(module), context.axis, context.path, shares), context.places[module]
    )


def replaced_by_row(module: nn.Module, context: Context, shares: Shares | None, idle_width: int = 0) -> Change:
    """A row-parallel layer in the module's place; an idle rank's takes ``idle_width`` features times zero."""
    check_linear(module, context.path)

    def change() -> None:
        layer = row_parallel(base_of(module), context.axis, context.path, shares)
        if idle_width:
            layer.weight = zeros(layer.weight, (layer.out_features, idle_width))
        replace_linear(module, layer, context.places[module])

    return change


def places_in(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The places of each module below ``model``: its owners and its names there."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is not None:
                found.setdefault(child, []).append((owner, name))
    return found


def replace_linear(
    old: nn.Module, new: ColumnParallelLinear | RowParallelLinear, places: Iterable[tuple[nn.Module, str]]
) -> None:
    """Put ``new`` in each place, or, where adapters are around the layer, inside them."""
    if is_adapter(old):
        from multicard.integrations.lora import put_inside

        put_inside(old, new)
    else:
        replace(new, places)


def replace(new: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
    """Put ``new`` in each place."""
    for owner, name in places:
        owner._modules[name] = new


def cut_parameter(owner: nn.Module, name: str, dim: int, spans: Spans) -> None:
    """Keep only ``spans`` of a parameter along ``dim``."""
    parameter = owner.get_parameter(name)
    owner._parameters[name] = cut(parameter, Shard(tuple(parameter.shape), dim, spans))


def zeros(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of zeros that no checkpoint holds."""
    return sharded(
        torch.zeros(shape, dtype=like.dtype, device=like.device),
        Shard(shape, 0, (range(shape[0]),), fill=0.0),
    )
