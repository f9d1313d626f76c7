"""What caches of diffusers keep between the calls of a denoiser whose batch rows are divided over ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from multicard.errors import UnsupportedError
from multicard.guidance import Part

HELD = "_multicard_held"
"""The attribute of a state that says which rows each rank has of it; none: all ranks have all."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """A stateful hook of diffusers.

    Attributes:
        name: the cache that it belongs to.
        rows: the fields of its state that carry the batch, in dim 0 of tensors and in shapes; None: it can't work on
            some of the rows.
        cfg: why it can't be used where ranks compute different branches; None: it can.
    """

    name: str
    rows: tuple[str, ...] | None = None
    cfg: str | None = None


def refused(name: str, cache: str, why: str, use: str) -> UnsupportedError:
    """The error for a cache that can't be used."""
    return UnsupportedError(f"{name} has a {cache}, which {why}: disable the cache (disable_cache()), or use {use}")


class Store:
    """What one hook keeps: a state for each ``cache_context`` or, in PyramidAttentionBroadcast, one for all calls."""

    def __init__(self, name: str, cache: Cache, hook: Any) -> None:
        from diffusers.hooks.hooks import StateManager

        self.cache = cache
        self._name, self._hook = name, hook
        self._manager: Any = next((x for x in vars(hook).values() if isinstance(x, StateManager)), None)

    @property
    def context(self) -> str | None:
        """The name of the current context; None: there is one state for all calls."""
        if self._manager is None:
            return None
        context = _context(self._manager)
        return "inference" if context is None else getattr(context, "name", context)  # the default is MagCache's

    def take(self, part: Part | None) -> None:
        """Before a call: make the state one of this rank's part of the batch; None: of all of it.

        Raises:
            UnsupportedError: it is of others; on every rank, unless only this one calls.
        """
        if self.cache.rows is None and part is not None and part.total:
            raise refused(self._name, self.cache.name, "can't work on a part of the batch", "cfg=1")
        state = self._state()
        held, wanted = getattr(state, HELD, None), _shares(part)
        if state is None or held == wanted:
            return
        if held is not None or part is None:
            raise refused(
                self._name,
                self.cache.name,
                "is only on the ranks that made these calls before: the calls of a step have changed, or an output was "
                "read before the step's last call",
                "cfg=1",
            )
        if part.rows and self.cache.rows is not None:
            narrow = functools.partial(_narrow, rows=part.rows, batch=part.batch)
            for field in self.cache.rows:
                setattr(state, field, tree_map(narrow, getattr(state, field)))

    def mark(self, part: Part | None) -> None:
        """After a call, of which this rank computed this part."""
        if part is not None and not part.rows:
            self._miss()
        if (state := self._state()) is not None:
            setattr(state, HELD, _shares(part))

    def freeze(self, fresh: bool) -> Callable[[], AbstractContextManager[None]]:
        """For later: the context of now; ``fresh``: without any state, for a while."""
        manager, hook = self._manager, self._hook
        then = None if manager is None else _context(manager)

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            if manager is None:
                kept, hook.state = hook.state, type(hook.state)() if fresh else hook.state
            else:
                now, kept = _context(manager), manager._state_cache
                manager.set_context(then)
                manager._state_cache = {} if fresh else kept
            try:
                yield
            finally:
                if manager is None:
                    hook.state = kept
                else:
                    manager.set_context(now)
                    manager._state_cache = kept

        return again

    def _state(self) -> Any:
        """The current state; None: it is empty."""
        if self._manager is not None:
            return self._manager._state_cache.get(self.context)
        return self._hook.state if self._hook.state.iteration else None

    def _miss(self) -> None:
        if self._manager is not None:
            self._manager._state_cache[self.context] = Missed()
        else:
            self._hook.state.cache = None
            self._hook.state.iteration += 1


class Missed:
    """In place of a state that only other ranks have, until it is reset."""

    def reset(self) -> None:
        pass  # the manager drops it


def _context(manager: Any) -> Any:
    """The context that is set: an object with a name or, in older releases of diffusers, a name."""
    return vars(manager)["_context" if "_context" in vars(manager) else "_current_context"]


def _shares(part: Part | None) -> tuple[int | range, ...] | None:
    """What identifies the rows that each rank has; None: all ranks have all."""
    if part is None or all(len(share) == part.batch for share in part.shares):
        return None
    return part.batch, *part.shares


def _narrow(leaf: Any, rows: range, batch: int) -> Any:
    """``rows`` of the ``batch`` in a tensor or a shape; a size of 1 serves all rows."""
    if not isinstance(leaf, (Tensor, torch.Size)):
        return leaf
    shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else tuple(leaf)
    if not shape or shape[0] == 1:
        return leaf
    each, rest = divmod(shape[0], batch)
    if rest:
        raise UnsupportedError(f"a cache keeps a tensor {shape} without {batch} rows: disable the cache, or use cfg=1")
    if isinstance(leaf, Tensor):
        return leaf.narrow(0, rows.start * each, len(rows) * each)
    return torch.Size((len(rows) * each, *shape[1:]))
