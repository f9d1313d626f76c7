"""diffusers' caches between steps, on split denoisers: the same decision on every rank, and states of the right rows.

Such a cache is a set of hooks on a model's blocks (``diffusers.hooks``), which skip work by what they kept from earlier
calls. What is kept belongs to a ``cache_context``, one for each guidance branch, or to all calls. Each rank keeps it of
its own tokens, and of the branches and rows that it computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.guidance import Part
from multicard.integrations.diffusers.hooks import own_hooks, stateful_hooks
from multicard.integrations.diffusers.sequence import split_of
from multicard.integrations.styles import Change
from multicard.mesh import ParallelMesh

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


_CHUNKS = "takes both branches of guidance out of one batch"
CACHES = {
    "FBCHeadBlockHook": Cache("FirstBlockCache", rows=("head_block_residual", "tail_block_residuals")),
    "MagCacheHeadHook": Cache("MagCache", rows=("previous_residual",)),
    "TaylorSeerCacheHook": Cache("TaylorSeer", rows=("taylor_factors", "inactive_shapes")),
    "PyramidAttentionBroadcastHook": Cache("PyramidAttentionBroadcast", rows=("cache",)),
    "SeaCacheRootHook": Cache("SeaCache"),
    "FasterCacheDenoiserHook": Cache("FasterCache", cfg=_CHUNKS),
    "FasterCacheBlockHook": Cache("FasterCache", cfg=_CHUNKS),
}
"""The stateful hooks that work on split models, by class; any other is refused."""


def check_caches(name: str, module: nn.Module, mesh: ParallelMesh, *, by_rows: bool = False) -> None:
    """Refuse caches that can't give what one process has on this mesh.

    Args:
        by_rows: the model's pictures are split by rows.

    Raises:
        UnsupportedError: names the cache.
    """
    if mesh.cfg.size == mesh.sequence.size == 1:
        return
    for hook in stateful_hooks(module):
        kind = type(hook).__name__
        cache = CACHES.get(kind)
        if cache is None or (by_rows and mesh.sequence.size > 1):
            raise _refused(
                name, kind, "keeps state from step to step", "tp or dp with cfg=1 and neither ring nor ulysses"
            )
        if cache.cfg and mesh.cfg.size > 1:
            raise _refused(name, cache.name, cache.cfg, "cfg=1")
        config = getattr(hook, "config", None)
        if getattr(config, "calibrate", False):
            raise _refused(name, cache.name, "is being calibrated", "calibrate=True on one process")
        if mesh.sequence.size > 1 and getattr(config, "raw_vision_callback", None) is not None:
            raise _refused(name, cache.name, "measures by a raw_vision_callback", "neither ring nor ulysses")


def enable_again(model: Any) -> Change:
    """The change that puts a model's cache on the layers that take the place of split ones; the last of its changes.

    Raises:
        UnsupportedError: the cache wasn't enabled by ``enable_cache``, so it can't be.
    """
    config = getattr(model, "_cache_config", None)
    if config is None:
        for module in model.modules():
            hooks = [hook for hook in own_hooks(module) if hook._is_stateful]
            if hooks and not any(True for _ in module.children()):
                cache = CACHES.get(type(hooks[0]).__name__, Cache(type(hooks[0]).__name__)).name
                raise UnsupportedError(
                    f"{type(model).__name__} has a {cache} on a {type(module).__name__}, which tp replaces: "
                    "enable it by enable_cache(), or after mc.parallelize"
                )

    def again() -> None:
        if config is not None:
            model.disable_cache()
            model.enable_cache(config)

    return again


def _refused(name: str, cache: str, why: str, use: str) -> UnsupportedError:
    return UnsupportedError(f"{name} has a {cache}, which {why}: disable the cache (disable_cache()), or use {use}")


class Caches:
    """The caches of one denoiser. All ranks make the same calls of the denoiser, or of :meth:`skip`."""

    def __init__(self, name: str, module: nn.Module, mesh: ParallelMesh) -> None:
        self._name, self._module, self._mesh = name, module, mesh
        self._stores: list[Store] = []
        self._part: Part | None = None
        self._used: set[str | None] = set()
        self._config: Any = None

    def adopt(self) -> None:
        """Take over the caches that are enabled now.

        Raises:
            UnsupportedError: one can't be used on this mesh.
        """
        split = split_of(self._module)
        check_caches(self._name, self._module, self._mesh, by_rows=split is None)
        if split:
            split.renew()
        self._config = getattr(self._module, "_cache_config", None)
        self._stores = []
        for hook in stateful_hooks(self._module):
            kind = type(hook).__name__
            if kind == "FBCHeadBlockHook":
                decide = functools.partial(self._differs, hook)
                hook._should_compute_remaining_blocks = torch.compiler.disable(decide)
            if self._mesh.cfg.size > 1:
                self._stores.append(Store(self._name, CACHES[kind], hook))

    def follow(self) -> None:
        """Take over a cache that was enabled since, for instance between two steps."""
        if getattr(self._module, "_cache_config", None) is not self._config:
            self.adopt()

    # FirstBlockCache

    def _differs(self, hook: Any, residual: Tensor) -> bool:
        """Whether the first block's residual differs from the last one by more than the hook's threshold.

        The mean of the absolute change, relative to the mean of the last residual's absolute values, over the tokens
        and rows of all ranks, rounded as one process rounds it. At most two small collectives, and one more with cfg.
        """
        last = hook.state_manager.get_state().head_block_residual
        sums = torch.zeros(2, device=residual.device)
        if last is not None:
            sums = torch.stack([x.abs().sum(dtype=torch.float32) for x in (residual - last, last)])
        shape = list(residual.shape)
        sums = collectives.broadcast(sums, self._mesh.tp)
        split = split_of(self._module)
        if split and split.mine is not None:
            if shape[1] != len(split.mine):
                raise UnsupportedError(
                    f"{self._name}: FirstBlockCache measures {shape[1]} tokens where {len(split.mine)} image tokens "
                    "are on this rank: disable the cache (disable_cache()), or use cfg, tp or dp"
                )
            sums, shape[1] = collectives.all_reduce(sums, self._mesh.sequence), split.length or 0
        change, size = sums.tolist()
        if self._part and self._part.total:
            change, size = self._part.total((change, size))
            shape[0] = shape[0] // len(self._part.rows) * self._part.batch
        means = (torch.tensor([change, size]) / max(1, math.prod(shape))).to(residual.dtype)
        return last is None or (means[0] / means[1]).item() > hook.threshold

    # Guidance branches on different ranks

    def start_step(self) -> None:
        """A denoising step begins."""
        self._used = set()

    def once(self) -> None:
        """A call of a step begins. Refuse two calls with the same state: ranks that compute one of them can't follow.

        Raises:
            UnsupportedError: names the cache.
        """
        names = {store.context for store in self._stores}
        if names & self._used:
            cache = self._stores[0].cache.name
            raise _refused(self._name, cache, "keeps one state for several calls of a step of this pipeline", "cfg=1")
        self._used |= names

    @property
    def keep(self) -> bool:
        """Whether there is a cache, with several ranks for guidance."""
        return bool(self._stores)

    @contextlib.contextmanager
    def during(self, part: Part | None) -> Iterator[None]:
        """Entered around a call of the denoiser with ``part`` of its batch; None: with all.

        Raises:
            UnsupportedError: ranks keep the states of other rows.
        """
        for store in self._stores:
            store.take(part)
        self._part = part
        try:
            yield
        finally:
            self._part = None
        for store in self._stores:
            store.mark(part)

    def skip(self, part: Part) -> None:
        """Other ranks make a call of the denoiser, of which this one has no rows.

        Raises:
            UnsupportedError: ranks keep the states of other rows.
        """
        for store in self._stores:
            store.take(part)
            store.mark(part)
        if part.total and any(store.cache.name == "FirstBlockCache" for store in self._stores):
            part.total((0.0, 0.0))  # the ranks with rows sum up what each measures

    def freeze(self, fresh: bool) -> Callable[[], AbstractContextManager[None]]:
        """For later: the ``cache_context`` of now. ``fresh``: with states of their own, as before a first call."""
        thens = [store.freeze(fresh) for store in self._stores]

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                for then in thens:
                    stack.enter_context(then())
                yield

        return again


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
            raise _refused(self._name, self.cache.name, "can't work on a part of the batch", "cfg=1")
        state = self._state()
        held, wanted = getattr(state, HELD, None), _shares(part)
        if state is None or held == wanted:
            return
        if held is not None or part is None:
            raise _refused(
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
    """The context that is set: an object with a name or, before diffusers 0.41, a name."""
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
