"""Tensor parallelism of a ``transformers`` model: the changes that split its weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from multicard.axis import Axis
from multicard.integrations.rest import rest
from multicard.integrations.seams import Hooks
from multicard.integrations.styles import Change, changes
from multicard.integrations.transformers.checks import check_structure
from multicard.integrations.transformers.heads import localize, read_heads
from multicard.integrations.transformers.plans import resolve_plan
from multicard.integrations.transformers.styles import STYLES
from multicard.integrations.transformers.vocabulary import head_paths, vocabulary_changes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tensor_changes(
    model: PreTrainedModel,
    axis: Axis,
    hooks: Hooks,
    plan: Mapping[str, str] | None = None,
    all_linears: bool = False,
) -> list[Change]:
    """The changes that reduce every planned module to this rank's part: checked, not made yet.

    Args:
        all_linears: also split the linear layers that the plan leaves whole (:func:`rest`).
    """
    if axis.size == 1:
        return []
    resolved = resolve_plan(model, plan)
    attentions = {
        path: read_heads(model.get_submodule(path), model, resolved.family(path), axis, path)
        for path in resolved.attentions
    }
    check_structure(model, resolved, attentions, trusted=plan is not None)
    styles = resolved.styles
    if all_linears:
        styles = {**styles, **rest(model, {*styles, *head_paths(model)})}
    found = changes(model, styles, STYLES, axis, hooks, attentions)
    for path, heads in attentions.items():
        found.append(functools.partial(localize, model.get_submodule(path), heads, resolved.family(path), hooks))
    return found + vocabulary_changes(model, axis, hooks)
