"""diffusers' caches between steps, on split denoisers: the same decision on every rank, and states of the right rows.

Such a cache is a set of hooks on a model's blocks (``diffusers.hooks``), which skip work by what they kept from earlier
calls. What is kept belongs to a ``cache_context``, one for each guidance branch, or to all calls. Each rank keeps it of
its own tokens, and of the branches and rows that it computes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.guidance import Part
from multicard.integrations.diffusers.hooks import own_hooks, stateful_hooks
from multicard.integrations.diffusers.sequence import SequenceSplit, split_of
from multicard.integrations.diffusers.stores import Cache, Store, refused
from multicard.integrations.styles import Change
from multicard.mesh import ParallelMesh

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
            raise refused(
                name, kind, "keeps state from step to step", "tp or dp with cfg=1 and neither ring nor ulysses"
            )
        if cache.cfg and mesh.cfg.size > 1:
            raise refused(name, cache.name, cache.cfg, "cfg=1")
        config = getattr(hook, "config", None)
        if getattr(config, "calibrate", False):
            raise refused(name, cache.name, "is being calibrated", "calibrate=True on one process")
        if mesh.sequence.size > 1 and getattr(config, "raw_vision_callback", None) is not None:
            raise refused(name, cache.name, "measures by a raw_vision_callback", "neither ring nor ulysses")


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
        by_rows = not isinstance(split, SequenceSplit)
        check_caches(self._name, self._module, self._mesh, by_rows=by_rows)
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
            raise refused(self._name, cache, "keeps one state for several calls of a step of this pipeline", "cfg=1")
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
