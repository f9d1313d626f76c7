"""Rows of a batch: which arguments carry the batch, taking some rows, and joining outputs again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from multicard.errors import MulticardError


class NotSplittableError(MulticardError):
    """A shape doesn't fit the plan, so the call is made with the whole batch. Caught within this package."""


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which arguments carry the batch: a table by name, not a guess from sizes.

    Attributes:
        sample: arguments that determine the number of rows; the first that a call has counts.
        dims: by argument name, the batch dim of tensors and of lists of tensors. Keys of dict arguments are looked up
            in the same way. Arguments that aren't named go to every rank whole.
        items: arguments that are lists with one element a row.
    """

    sample: tuple[str, ...] = ("hidden_states", "sample")
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    items: frozenset[str] = frozenset()

    def rows(self, kwargs: Mapping[str, Any]) -> int:
        """Rows in the batch of this call; 1 if no argument determines it."""
        for name in self.sample:
            value = kwargs.get(name)
            if isinstance(value, Tensor) and value.dim():
                return value.shape[0]
            if isinstance(value, list) and name in self.items:
                return len(value)
        return 1

    def take(self, kwargs: Mapping[str, Any], rows: range, batch: int) -> dict[str, Any]:
        """The arguments of the call with only ``rows`` of its ``batch``.

        Raises:
            NotSplittableError: an argument that should carry the batch has another number of rows.
        """
        return {name: self._take(name, value, rows, batch) for name, value in kwargs.items()}

    def _take(self, name: str, value: Any, rows: range, batch: int) -> Any:
        if isinstance(value, Mapping):
            return {key: self._take(key, item, rows, batch) for key, item in value.items()}
        if isinstance(value, list) and name in self.items and len(value) == batch:
            return value[rows.start : rows.stop]
        if name not in self.dims:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self._take(name, item, rows, batch) for item in value)
        if isinstance(value, Tensor) and value.dim() > self.dims[name]:
            return _take_rows(value, self.dims[name], rows, batch)
        return value


def take_output(output: Any, rows: range, batch: int) -> Any:
    """The output of a call with only ``rows`` of its ``batch``: dim 0 of tensors, elements of lists of that length.

    Raises:
        NotSplittableError: a tensor's dim 0 isn't a multiple of ``batch``.
    """

    def take(value: Any) -> Any:
        if isinstance(value, list):
            if len(value) == batch:
                return value[rows.start : rows.stop]
            return [take_output(item, rows, batch) for item in value]
        if isinstance(value, Tensor):
            if not value.dim() or (value.shape[0] == 1 and batch > 1):
                raise NotSplittableError(f"an output of shape {tuple(value.shape)} has no rows")
            return _take_rows(value, 0, rows, batch)
        return value

    return tree_map(take, output, is_leaf=lambda x: isinstance(x, list))


def merge_outputs(parts: Sequence[Any], batch: int) -> Any:
    """The inverse of :func:`take_output`: one output for the whole ``batch`` from outputs of consecutive rows."""

    def merge(*values: Any) -> Any:
        first = values[0]
        if isinstance(first, list):
            if sum(len(value) for value in values) == batch:
                return [item for value in values for item in value]
            return [merge_outputs(items, batch) for items in zip(*values, strict=True)]
        return torch.cat(values) if isinstance(first, Tensor) else first

    return tree_map(merge, *parts, is_leaf=lambda x: isinstance(x, list)) if len(parts) > 1 else parts[0]


def _take_rows(t: Tensor, dim: int, rows: range, batch: int) -> Tensor:
    """``rows`` of ``t``. A row of the batch may be several rows of the tensor (frames); a size of 1 serves all rows."""
    size = t.shape[dim]
    if size == 1:
        return t
    if size % batch:
        raise NotSplittableError(f"dim {dim} of {tuple(t.shape)} isn't a multiple of {batch} rows")
    each = size // batch
    return t.narrow(dim, rows.start * each, len(rows) * each)
