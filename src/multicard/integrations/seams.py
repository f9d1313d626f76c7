"""Seams into other libraries, and proof in each run that they were used.

A new release may rename an argument, call another function, or remove a hook; a split model would then be wrong without
an error. So every seam counts the calls that go through it, and a bypassed seam raises before its result is used.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from multicard import versions
from multicard.errors import UnsupportedError
from multicard.integrations.quantized import quantized_tensor
from multicard.layers import RowParallelLinear


def bypassed(library: str, what: str) -> UnsupportedError:
    """The error for a seam that wasn't used as planned."""
    return UnsupportedError(
        f"{what}. The result would have been wrong. Installed is {versions.describe(library)}. The likely cause is "
        "another release, or a change to this model after it was split"
    )


def facts(model: nn.Module) -> dict[str, Any]:
    """What ranks compare of a model before it is split: class, config, parameters, some of the parameters' numbers."""
    config = getattr(model, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    parameters = list(model.named_parameters())
    some = [
        p.detach().flatten()[:: max(1, p.numel() // 8)][:9].float()
        for _, p in parameters
        if not p.is_meta and quantized_tensor(p) is None
    ]
    return {
        "class": type(model).__qualname__,
        "config": {key: value for key, value in settings.items() if not key.startswith("_")},
        "parameters": [(name, p.shape, p.dtype) for name, p in parameters],
        "numbers among its parameters": torch.cat(some) if some else None,
    }


class Hooks:
    """The hooks that a split model relies on."""

    def __init__(self, library: str) -> None:
        self._library = library
        self._placed: list[tuple[RemovableHandle, str]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """Before each forward of ``module``: ``hook(module, args, kwargs)``."""
        self._keep(module, module.register_forward_pre_hook(hook, with_kwargs=True, **options))

    def after(self, module: nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """After each forward of ``module``: ``hook(module, args, output)``."""
        self._keep(module, module.register_forward_hook(hook, **options))

    def _keep(self, module: nn.Module, handle: RemovableHandle) -> None:
        self._placed.append((handle, type(module).__name__))

    def remove(self) -> None:
        """Remove all of them."""
        for handle, _ in self._placed:
            handle.remove()
        self._placed.clear()

    def check(self) -> None:
        """Raise UnsupportedError if other code has removed one."""
        for handle, name in self._placed:
            placed = handle.hooks_dict_ref()
            if placed is None or handle.id not in placed:
                raise bypassed(self._library, f"a hook that splits {name} has been removed")


class RowProof:
    """Proof that a model's row-parallel layers are called, so that their outputs are summed over ranks.

    If a module runs and none of the row-parallel layers directly in it does, other code has multiplied by a shard of
    their weights. Checked once for each kind of call, with temporary hooks.
    """

    def __init__(self, library: str, model: nn.Module) -> None:
        self._library = library
        self._rows = _rows(model)
        self._seen: set[Any] = set()

    @contextlib.contextmanager
    def __call__(self, kind: Any) -> Iterator[None]:
        """Entered while the model runs; raises UnsupportedError afterwards if a layer wasn't called."""
        if kind in self._seen:
            yield
            return
        with counted([*self._rows, *(row for _, inside in self._rows.values() for row in inside)]) as calls:
            yield
        for owner, (path, inside) in self._rows.items():
            if calls[owner] and not any(calls[row] for row in inside):
                raise bypassed(self._library, f"{path} ({type(owner).__name__}) ran without its row-parallel layer")
        self._seen.add(kind)


def _rows(model: nn.Module) -> dict[nn.Module, tuple[str, list[nn.Module]]]:
    """The path and the layers of each module that has row-parallel layers directly in it (or in its ``ModuleList``)."""
    found: dict[nn.Module, tuple[str, list[nn.Module]]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, RowParallelLinear):
            owner = path.rpartition(".")[0]
            while isinstance(modules[owner], nn.ModuleList):
                owner = owner.rpartition(".")[0]
            found.setdefault(modules[owner], (owner, []))[1].append(module)
    return found


@contextlib.contextmanager
def counted(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Counts how often each of ``modules`` is called inside the context."""
    calls: Counter[nn.Module] = Counter()
    handles = [module.register_forward_pre_hook(lambda module, args: calls.update([module])) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
