"""Seams of a diffusers pipeline: its ``__call__``, its denoisers' and its schedulers' ``step``, intercepted in place.

A method is intercepted in its class, for those objects that have a guide; others of the class don't notice. So objects
keep their class, which pipelines compare; a copy of one is intercepted like the original; and whatever is put around
``forward`` later (offloading, hooks, compilation) stays inside.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from multicard.errors import UnsupportedError
from multicard.guidance import BatchPlan, Branches, unwrap
from multicard.integrations.diffusers.state import ModuleState
from multicard.mesh import Axis

DENOISER_NAMES = re.compile(r"transformer|unet|prior|denoiser|(^|_)dit($|_)|^decoder$")
NO_DENOISERS = ("autoencoders", "controlnets", "adapter")  # packages of diffusers.models
GUIDE, PLAIN = "_multicard_guide", "_multicard_plain"

Plain = Callable[..., Any]


class HookedDenoiser:
    """A denoising module as :class:`~multicard.guidance.Denoiser`; its arguments by name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._modules = list(uncompiled(module).modules())
        self._signature = inspect.signature(type(uncompiled(module)).forward)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        bound = self._signature.bind(self.module, *args, **kwargs)
        named = dict(list(bound.arguments.items())[1:])
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(parameter.name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
                raise UnsupportedError(f"{self.name} takes *{parameter.name}: pass its arguments by name for cfg")
        return named

    def run(self, kwargs: Mapping[str, Any]) -> Any:
        call = type(self.module).__call__
        return getattr(call, PLAIN, call)(self.module, **kwargs)

    def state(self) -> object:
        return ModuleState(self._modules)

    def freeze(self) -> Callable[[Mapping[str, Any]], Any]:
        """``run`` with the hooks of now: diffusers' and accelerate's hooks live in ``forward`` of the instance."""
        hooked = self._hooked()

        def run(kwargs: Mapping[str, Any]) -> Any:
            with _forwards(self._hooked(), hooked):
                return self.run(kwargs)

        return run

    def _hooked(self) -> dict[nn.Module, Any]:
        return {module: module.__dict__["forward"] for module in self._modules if "forward" in module.__dict__}


@contextlib.contextmanager
def _forwards(now: Mapping[nn.Module, Any], then: Mapping[nn.Module, Any]) -> Iterator[None]:
    _set_forwards(now, then)
    try:
        yield
    finally:
        _set_forwards(then, now)


def _set_forwards(old: Mapping[nn.Module, Any], new: Mapping[nn.Module, Any]) -> None:
    for module in old.keys() - new.keys():
        del module.__dict__["forward"]
    for module, forward in new.items():
        module.__dict__["forward"] = forward


class GuidedPipeline:
    """Gives the branches of one pipeline to the ranks of ``axis``."""

    def __init__(self, axis: Axis, batch: BatchPlan) -> None:
        self.branches = Branches(axis, batch)
        self._denoisers: dict[nn.Module, HookedDenoiser] = {}
        self._running = False

    def __deepcopy__(self, memo: Any) -> GuidedPipeline:
        return self  # pipelines copy their schedulers; the copies count the same steps

    def attach(self, pipe: Any) -> None:
        """Intercept the components that ``pipe`` has now; some may have been replaced since the last call.

        Raises:
            UnsupportedError: no denoiser, or one whose cache keeps state from branch to branch.
        """
        found = denoisers(pipe)
        for name, module in found.items():
            check_caches(name, module)
            intercept(module, "__call__", "denoise", self)
        self._denoisers = {module: HookedDenoiser(name, module) for name, module in found.items()}
        for component in pipe.components.values():
            if hasattr(component, "step") and hasattr(component, "set_timesteps"):
                intercept(component, "step", "step", self)

    def denoise(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        denoiser = self._denoisers.get(module)
        if denoiser is None or not self._running:  # a copy, or somebody calls a component of the pipeline by itself
            return plain(*args, **kwargs)
        return self.branches.call(denoiser, denoiser.bind(args, kwargs))

    def step(self, scheduler: Any, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A scheduler's ``step``: the branches of this step have all been called."""
        self.branches.end_step()
        return plain(*unwrap(args), **unwrap(kwargs))

    def run(self, pipe: Any, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The pipeline's own ``__call__``."""
        if self._running:
            return plain(*args, **kwargs)
        self.attach(pipe)
        self._running, failed = True, True
        try:
            output = plain(*args, **kwargs)
            failed = False
        finally:
            self._running = False
            self.branches.finish(failed)
        return unwrap(output)


class GuidedModel:
    """A denoiser without a pipeline: every call's batch is split over ``axis``."""

    def __init__(self, module: nn.Module, axis: Axis, batch: BatchPlan) -> None:
        check_caches(type(module).__name__, module)
        self._denoiser = HookedDenoiser(type(module).__name__, module)
        self._branches = Branches(axis, batch, step_per_call=True)
        intercept(module, "__call__", "denoise", self)

    def __deepcopy__(self, memo: Any) -> GuidedModel:
        return self

    def denoise(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if module is not self._denoiser.module:  # a copy
            return plain(*args, **kwargs)
        check_caches(self._denoiser.name, module)
        try:
            return self._branches.call(self._denoiser, self._denoiser.bind(args, kwargs))
        finally:
            self._branches.finish(failed=True)


def guide_pipeline(pipe: Any, axis: Axis, batch: BatchPlan) -> None:
    """CFG parallel for every later call of ``pipe``."""
    guide = GuidedPipeline(axis, batch)
    guide.attach(pipe)
    intercept(pipe, "__call__", "run", guide)


def guide_model(module: nn.Module, axis: Axis, batch: BatchPlan) -> None:
    """CFG parallel for every later call of a denoiser that no pipeline calls."""
    GuidedModel(module, axis, batch)


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components of ``pipe`` that may run once a step: by their role, never a text encoder or an autoencoder."""
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module) and not _is_beside(c)}
    found = {name: module for name, module in modules.items() if DENOISER_NAMES.search(name)} or modules
    if not found:
        raise UnsupportedError(f"{type(pipe).__name__} has no denoiser among {', '.join(pipe.components)}: use cfg=1")
    return found


def uncompiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` wraps; another module is itself."""
    wrapped = getattr(module, "_orig_mod", module)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def _is_beside(module: nn.Module) -> bool:
    packages = [base.__module__.split(".") for base in type(uncompiled(module)).__mro__]
    return any(p[0] == "transformers" or any(name in p for name in NO_DENOISERS) for p in packages)


def check_caches(name: str, module: nn.Module) -> None:
    """Refuse caches between steps: a rank that doesn't compute a branch would have an old cache for it."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry else ():
            if hook._is_stateful:
                raise UnsupportedError(
                    f"{name} has a {type(hook).__name__}, which keeps state from step to step: "
                    "disable the cache (disable_cache()) or use cfg=1"
                )


def intercept(instance: Any, name: str, answer: str, guide: GuidedPipeline | GuidedModel) -> None:
    """Let ``guide.answer(instance, plain, args, kwargs)`` answer ``instance.name``, which was ``plain`` before."""
    instance.__dict__[GUIDE] = guide
    cls = type(instance)
    plain = getattr(cls, name)
    if hasattr(plain, PLAIN):
        return

    @functools.wraps(plain)
    def intercepted(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        guide = None if torch.compiler.is_compiling() else self.__dict__.get(GUIDE)
        if guide is None:
            return plain(self, *args, **kwargs)
        return getattr(guide, answer)(self, functools.partial(plain, self), args, kwargs)

    setattr(intercepted, PLAIN, plain)
    setattr(cls, name, intercepted)
