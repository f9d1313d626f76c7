"""Tensor parallelism of a ``diffusers`` model: the changes that split its weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

from multicard.axis import Axis
from multicard.integrations.diffusers.heads import localize, read_heads
from multicard.integrations.diffusers.plans import tensor_plan
from multicard.integrations.diffusers.styles import STYLES
from multicard.integrations.rest import rest
from multicard.integrations.seams import Hooks
from multicard.integrations.styles import Change, changes

HOOKS = "_multicard_tensor_hooks"


def tensor_changes(model: nn.Module, axis: Axis, plan: Mapping[str, str] | None = None) -> list[Change]:
    """The changes that reduce every planned module to this rank's part: checked, not made yet.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: there is no plan, or a layer can't be split exactly; the message names it.
    """
    resolved, hooks = tensor_plan(model, plan), Hooks("diffusers")
    styles = resolved.styles
    if plan is None:
        styles = {**styles, **rest(model, styles)}
    heads = {path: read_heads(model.get_submodule(path), axis, path) for path in resolved.attentions}
    found = changes(model, styles, STYLES, axis, hooks, heads)
    for path, each in heads.items():
        found.append(functools.partial(localize, model.get_submodule(path), each))
    return [*found, lambda: model.__dict__.update({HOOKS: hooks})]


def tensor_hooks(model: nn.Module) -> Hooks | None:
    """The hooks that the model's split weights rely on; None if they aren't split."""
    return model.__dict__.get(HOOKS)


def is_split(model: nn.Module) -> bool:
    """Whether its weights are split already."""
    return tensor_hooks(model) is not None
