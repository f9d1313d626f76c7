# ruff: noqa: SIM905  lists of names are easier to read and compare as one string
"""Tensors without values yet: shape, dtype and device are known; the values are computed when they are read.

A :class:`LazyTensor` is one output of a :class:`Promise`. Views, casts and elementwise arithmetic on it are deferred
too; any other use (a print, ``numpy``, a kernel that needs the numbers, an in-place write) makes the promise compute,
on this rank alone. So a program that only passes the tensor on works unchanged, and one that reads it gets the right
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from multicard.guidance.trees import template

PUT_OFF = frozenset(
    "view _unsafe_view reshape flatten unflatten slice select narrow transpose permute movedim t unsqueeze squeeze "
    "expand split split_with_sizes chunk unbind alias detach to _to_copy clone contiguous type_as "
    "add sub rsub mul div neg".split()
)
"""aten operations that can be deferred: pure, and the shapes of the operands determine that of the result."""

METADATA = frozenset(
    "shape dtype device layout ndim requires_grad is_leaf is_cuda is_cpu is_sparse is_quantized is_meta is_nested "
    "size dim stride numel nelement element_size is_floating_point is_complex is_contiguous __len__".split()
)
PYTHON_NAMES = frozenset(
    "__getitem__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __neg__ subtract multiply divide "
    "negative float half bfloat16 double swapaxes swapdims view_as expand_as tensor_split".split()
)  # what the operations above are called in Python


class Promise:
    """Tensors, in a fixed order, that get values later: from the exchange, or from ``compute`` when first read."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self._compute: Callable[[], Sequence[Tensor]] | None = compute
        self._values: Sequence[Tensor] | None = None
        self._dependents: list[Promise] = []

    @property
    def kept(self) -> bool:
        return self._values is not None

    def keep(self, values: Sequence[Tensor]) -> None:
        """Fill in the values, unless they were already read: then they may have been changed in place since."""
        if self.kept:
            return
        self._values, self._compute = values, None
        waiting, self._dependents = self._dependents, []
        for promise in waiting:  # now, before an in-place write to these values could change their operands
            promise.settle()

    def settle(self) -> None:
        """Compute if all operands have values."""
        if not self.kept and all(operand.kept for operand in getattr(self, "operands", ())):
            self.values()

    def values(self) -> Sequence[Tensor]:
        if self._values is None:
            assert self._compute is not None
            self.keep(self._compute())
        assert self._values is not None
        return self._values


class Operation(Promise):
    """A deferred operation on promises and on copies of real tensors."""

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.operands: list[Promise] = []
        tree_map_only(LazyTensor, lambda x: self.operands.append(x.promise), (args, kwargs))
        args, kwargs = tree_map_only(Tensor, lambda t: t if isinstance(t, LazyTensor) else t.clone(), (args, kwargs))
        super().__init__(lambda: _as_list(func(*unwrap(args), **unwrap(kwargs))))
        for operand in self.operands:
            operand._dependents.append(self)


class LazyTensor(Tensor):
    """One tensor of a :class:`Promise`; has no storage of its own."""

    promise: Promise
    position: int

    @staticmethod
    def __new__(cls, template: Tensor, device: torch.device, promise: Promise, position: int) -> LazyTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls, template.shape, strides=template.stride(), dtype=template.dtype, device=device
        )
        self.promise, self.position = promise, position
        return self

    def value(self) -> Tensor:
        """The real tensor, computed if necessary."""
        return self.promise.values()[self.position]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # unknown functions read the value: numpy, tolist, save, deepcopy, data_ptr never reach the dispatcher
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name not in METADATA and name not in PUT_OFF and name not in PYTHON_NAMES:
            args, kwargs = unwrap(args), unwrap(kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        waiting = tree_any(lambda x: isinstance(x, LazyTensor) and not x.promise.kept, (args, kwargs))
        name = func._schema.name.partition("::")[2]
        if waiting and name in PUT_OFF and not func._schema.is_mutable and not _moves(args, kwargs):
            return _put_off(func, args, kwargs)
        return func(*unwrap(args), **unwrap(kwargs))


def promise_like(
    templates: Sequence[Tensor], device: torch.device, compute: Callable[[], Sequence[Tensor]]
) -> tuple[Promise, list[Tensor]]:
    """A promise of tensors on ``device`` with the templates' shapes and dtypes, and its lazy tensors."""
    promise = Promise(compute)
    return promise, [LazyTensor(t, device, promise, i) for i, t in enumerate(templates)]


def unwrap(tree: Any) -> Any:
    """``tree`` with lazy tensors replaced by real ones, which are computed; ``tree`` itself if it has none."""
    if not tree_any(lambda x: isinstance(x, LazyTensor), tree):
        return tree  # not all containers can be rebuilt from their elements
    return tree_map_only(LazyTensor, LazyTensor.value, tree)


def _put_off(func: Any, args: Any, kwargs: Any) -> Any:
    device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor))
    meta_args, meta_kwargs = tree_map_only(Tensor, template, (args, kwargs))
    shapes = func(*meta_args, **meta_kwargs)
    promise = Operation(func, args, kwargs)
    lazy = [LazyTensor(t, device, promise, i) for i, t in enumerate(_as_list(shapes))]
    return type(shapes)(lazy) if isinstance(shapes, (list, tuple)) else lazy[0]


def _moves(args: Any, kwargs: Any) -> bool:
    return tree_any(lambda x: isinstance(x, torch.device), (args, kwargs))


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
