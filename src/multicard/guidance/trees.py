"""Arguments and outputs as trees of tensors: signatures, copies, templates."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

TRANSPARENT = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
"""Types of arguments that a call can't change. A call with any other (caches, generators) is made on every rank."""


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of ``tree``, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def signature(name: str, kwargs: Mapping[str, Any]) -> Hashable:
    """Shapes, dtypes and structure, without the values of numbers: timesteps change but don't affect shapes."""
    leaves, spec = tree_flatten(dict(kwargs))
    return (name, spec, *(_describe(leaf) for leaf in leaves))


def is_transparent(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call can't change any of these arguments."""
    return all(isinstance(leaf, TRANSPARENT) for leaf in tree_leaves(dict(kwargs)))


def clone(tree: Any) -> Any:
    """``tree`` with copies of its tensors."""
    return tree_map_only(Tensor, Tensor.clone, tree)


def template(t: Tensor) -> Tensor:
    """``t`` without values: on the meta device, with the same layout in memory."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def fill(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """``tree`` with its tensors replaced by these, in order."""
    values = iter(tensors)
    return tree_map_only(Tensor, lambda _: next(values), tree)


def same_shapes(tensors: Sequence[Tensor], templates: Sequence[Tensor]) -> bool:
    """Whether shapes and dtypes are those of the templates."""
    return [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in templates]


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, (bool, str, type(None), torch.dtype)) else type(leaf)
