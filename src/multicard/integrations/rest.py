"""The linear layers that a plan leaves whole, split too: each with gathered outputs.

A layer with gathered outputs returns what the whole one returns, so nothing around it has to be known. It costs one
all-gather a call, so the smallest layers stay whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator

from torch import nn

from multicard.errors import UnsupportedError
from multicard.integrations.adapters import base_of, is_adapter
from multicard.integrations.linears import check_linear, column_parallel
from multicard.integrations.quantized import has_split_form
from multicard.integrations.styles import Change, Context, replace_linear

SMALL = 1 / 200
"""The smallest layers stay whole if they hold together at most this share of the model's parameters."""


def gathered(module: nn.Module, context: Context) -> Change:
    """Split output features evenly, and gather them."""
    check_linear(module, context.path)
    return lambda: replace_linear(
        module,
        column_parallel(base_of(module), context.axis, context.path, gather_output=True),
        context.places[module],
    )


def rest(model: nn.Module, planned: Container[str]) -> dict[str, str]:
    """The style ``gathered`` for the linear layers that ``planned``, paths, doesn't have, by path, without small ones.

    Layers that can't be split, share their weight with another module, or whose weight other code multiplies with,
    aren't in it either.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    sizes = {}
    for path, module in _linears(model):
        weight = base_of(module).get_parameter("weight")
        if path not in planned and uses[id(weight)] == 1 and _is_plain(module, path) and not _is_read(model, path):
            sizes[path] = weight.numel()
    spare = SMALL * sum(parameter.numel() for parameter in model.parameters())
    found = {}
    for path in sorted(sizes, key=lambda path: sizes[path]):
        spare -= sizes[path]
        if spare < 0:
            found[path] = "gathered"
    return found


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by path; one with adapters stands for what is in it."""
    adapted: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(adapted):
            continue
        if is_adapter(module):
            adapted += (f"{path}.",)
        base = base_of(module)
        if type(base) is nn.Linear or (isinstance(base, nn.Linear) and has_split_form(base)):
            yield path, module


def _is_read(model: nn.Module, path: str) -> bool:
    """Whether the forward of a module around the layer names the layer and a ``weight``: it may multiply by itself."""
    *owners, name = path.split(".")
    while name.isdecimal() and owners:  # an item of a list
        name = owners.pop()
    for depth in range(len(owners) + 1):
        code = getattr(inspect.unwrap(type(model.get_submodule(".".join(owners[:depth]))).forward), "__code__", None)
        if code is not None and {name, "weight"} <= set(code.co_names):
            return True
    return False


def _is_plain(module: nn.Module, path: str) -> bool:
    try:
        return bool(check_linear(module, path))
    except UnsupportedError:
        return False
