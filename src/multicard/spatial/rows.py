"""A tensor of which each rank holds some rows, and which behaves as the whole.

A network runs on it unmodified: its shape is the whole tensor's, and each operation of torch gives this rank's rows of
what it would give on the whole tensor. So padding along rows is the neighbours' rows. An operation without a rule of
its own in this folder gathers its operands and gives a whole tensor: exact, but nothing is saved from there on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from multicard.axis import Axis
from multicard.mesh import ParallelMesh, single
from multicard.partition import merge_spans
from multicard.spatial.exchange import Fetch, gather, take
from multicard.spatial.layout import Layout, even

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""``(operation, args, kwargs)`` to its result; NotImplemented: this rule doesn't cover these arguments."""

RULES: dict[Any, Rule] = {}
"""By aten operation (all its overloads)."""

FUNCTIONS: dict[Any, Rule] = {}
"""By function of torch, for those that torch takes apart before it calls aten's operations."""


def rule(*names: str, anywhere: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for aten operations whose first argument is split; ``anywhere``: or any other."""

    def register(function: Rule) -> Rule:
        def first(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return function(func, args, kwargs) if args and isinstance(args[0], Rows) else NotImplemented

        RULES.update({getattr(torch.ops.aten, name): function if anywhere else first for name in names})
        return function

    return register


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Over which ranks tensors are split.

    Attributes:
        mesh: the ranks of its ``sequence`` hold the rows; attention is over its ring and ulysses.
        whole: operations without a rule that gathered their operands, counted by name.
    """

    mesh: ParallelMesh
    whole: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def axis(self) -> Axis:
        return self.mesh.sequence

    def __deepcopy__(self, memo: Any) -> Split:
        return self  # a copied network is split over the same ranks

    @staticmethod
    def over(axis: Axis) -> Split:
        """Over all ranks of one axis, with attention as a ring."""
        return Split(dataclasses.replace(single(), sequence=axis, ring=axis))


class Rows(Tensor):
    """This rank's rows of a tensor. For inference: it carries no gradient.

    Attributes:
        local: this rank's part.
        held: which rows each rank holds.
        ranks: over which it is split.
    """

    local: Tensor
    held: Layout
    ranks: Split

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, split: Split) -> Rows:
        shape = list(local.shape)
        shape[layout.dim] = layout.outer * layout.rows
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        self.local, self.held, self.ranks = local, layout, split
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rows(shape={tuple(self.shape)}, dtype={self.dtype}, held={self.held})"

    @property
    def rank(self) -> int:
        return self.ranks.axis.rank

    def like(self, local: Tensor, layout: Layout | None = None) -> Rows:
        """A tensor split over the same ranks; by default with the same layout."""
        return Rows(local, layout or self.held, self.ranks)

    def gathered(self) -> Tensor:
        """The whole tensor, on every rank. One all-gather."""
        return gather(self.local, self.held, self.ranks.axis)

    def fetch(self, wanted: Sequence[Sequence[range]]) -> Fetch:
        """Start to bring every rank the rows that it needs."""
        return Fetch(self.local, self.held, self.ranks.axis, wanted)

    def recut(self, cuts: Sequence[int]) -> Rows:
        """The same tensor with other rows on each rank; itself where they are the same. Point-to-point messages."""
        if tuple(cuts) == self.held.cuts:
            return self
        layout = self.held.cut(cuts)
        return self.like(self.fetch([[span] for span in layout.spans]).wait(), layout)

    def picked(self, rows: Sequence[int], cuts: Sequence[int]) -> Rows:
        """The tensor whose row ``i`` is row ``rows[i]`` of this. Point-to-point messages."""
        layout = self.held.cut(cuts)
        wanted = [merge_spans([range(rows[i], rows[i] + 1) for i in span]) for span in layout.spans]
        return self.like(self.fetch(wanted).wait(), layout)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = FUNCTIONS.get(func)
        return (function or plainly)(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        found = RULES.get(func.overloadpacket)
        if found is None and torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
            found = RULES[torch.ops.aten.add]
        with torch._C.DisableTorchFunction():  # what rules make isn't to be split
            out = NotImplemented if found is None else found(func, args, kwargs)
            if out is NotImplemented:
                out = func.decompose(*args, **kwargs)
            return on_whole(func, args, kwargs) if out is NotImplemented else out


class NewRows(TorchFunctionMode):
    """While it is entered, new tensors of four dims or more are split by rows: networks make them to write into."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NEW and args and isinstance(args[0], (tuple, list)) and len(args[0]) >= 4:
            size, *others = args
            layout = even(len(size) - 2, size[-2], self._split.axis.size)
            return Rows(func(layout.shape(size, self._split.axis.rank), *others, **kwargs), layout, self._split)
        return func(*args, **kwargs)


NEW = (torch.empty, torch.zeros, torch.ones, torch.full)


def plainly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of torch, taken apart to aten's operations."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def split_rows(x: Tensor, split: Split, dim: int = -2) -> Rows:
    """This rank's rows of a tensor that every rank holds. No communication.

    Args:
        x: ``(..., rows, columns)``, the same on every rank.
        dim: of the rows.
    """
    layout = even(dim % x.dim(), x.shape[dim], split.axis.size)
    return Rows(take(x, layout, split.axis.rank), layout, split)


def on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    """The result on whole tensors; what it writes to gets this rank's rows back. One all-gather a tensor."""
    gathered: dict[int, tuple[Rows, Tensor]] = {}

    def whole(value: Any) -> Any:
        if isinstance(value, Rows):
            if id(value) not in gathered:
                gathered[id(value)] = value, value.gathered()
                value.ranks.whole[func.overloadpacket.__name__] += 1
            return gathered[id(value)][1]
        return type(value)(map(whole, value)) if isinstance(value, (list, tuple)) else value

    out = func(*whole(args), **{name: whole(value) for name, value in kwargs.items()})
    if func._schema.is_mutable:
        for rows, tensor in gathered.values():
            rows.local.copy_(take(tensor, rows.held, rows.rank))
            out = rows if out is tensor else out
    return out
