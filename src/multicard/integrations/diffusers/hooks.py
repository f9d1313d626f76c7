"""The hooks that diffusers itself places on modules (``diffusers.hooks``): caches, layer skips, offloading.

Each takes the place of a module's ``forward`` and calls the one that was there before, or doesn't.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def own_hooks(module: nn.Module) -> list[Any]:
    """The hooks on ``module`` itself, in the order in which they were placed: the first is the innermost."""
    registry = getattr(module, "_diffusers_hook", None)
    return list(registry.hooks.values()) if registry else []


def stateful_hooks(model: nn.Module) -> Iterator[Any]:
    """The hooks on ``model`` and inside it that keep state from call to call: those of caches."""
    for module in model.modules():
        yield from (hook for hook in own_hooks(module) if hook._is_stateful)


def innermost(module: nn.Module) -> tuple[Any, str]:
    """The object and attribute in which the forward is that runs inside all hooks, and stays when they are removed."""
    hooks = own_hooks(module)
    if not hooks:
        return module, "forward"
    return hooks[0].fn_ref, "original_forward" if hooks[0].fn_ref.original_forward else "forward"
