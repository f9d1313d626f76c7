"""Seams of a diffusers pipeline: its ``__call__``, its denoisers' and its schedulers' ``step``, intercepted in place.

An object is intercepted by giving it a subclass of its own class, as FSDP does: whatever is put around ``forward``
later (offloading, hooks, compilation) stays inside, and a copy of the object is intercepted like the original.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from multicard.errors import UnsupportedError
from multicard.guidance import BatchPlan, Branches, unwrap
from multicard.mesh import Axis

DENOISER_NAMES = re.compile(r"transformer|unet|prior|denoiser|(^|_)dit($|_)|^decoder$")
NO_DENOISERS = ("autoencoders", "controlnets", "adapter")  # packages of diffusers.models


class HookedDenoiser:
    """A denoising module as :class:`~multicard.guidance.Denoiser`; its arguments by name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._modules = list(module.modules())
        self._signature = inspect.signature(plain_class(getattr(module, "_orig_mod", module)).forward)

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
        return plain_class(self.module).__call__(self.module, **kwargs)

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
            if module not in self._denoisers:
                self._denoisers[module] = HookedDenoiser(name, module)
            intercept(module, __call__=_denoise)
            module.__dict__["_multicard_guide"] = self
        self._denoisers = {module: self._denoisers[module] for module in found.values()}
        for component in pipe.components.values():
            if hasattr(component, "step") and hasattr(component, "set_timesteps"):
                intercept(component, step=_step)
                component._multicard_guide = self

    def denoise(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        denoiser = self._denoisers.get(module)
        if denoiser is None or not self._running:  # a copy, or somebody calls a component of the pipeline by itself
            return plain_class(module).__call__(module, *args, **kwargs)
        return self.branches.call(denoiser, denoiser.bind(args, kwargs))

    def run(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The pipeline's own ``__call__``."""
        plain = plain_class(pipe)
        if self._running:
            return plain.__call__(pipe, *args, **kwargs)
        self.attach(pipe)
        self._running, failed = True, True
        try:
            output = plain.__call__(pipe, *args, **kwargs)
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
        intercept(module, __call__=_denoise)
        module.__dict__["_multicard_guide"] = self

    def denoise(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        check_caches(self._denoiser.name, module)
        try:
            return self._branches.call(self._denoiser, self._denoiser.bind(args, kwargs))
        finally:
            self._branches.finish(failed=True)


def guide_pipeline(pipe: Any, axis: Axis, batch: BatchPlan) -> None:
    """CFG parallel for every later call of ``pipe``."""
    guide = GuidedPipeline(axis, batch)
    guide.attach(pipe)
    intercept(pipe, __call__=_run)
    pipe._multicard_guide = guide


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


def _is_beside(module: nn.Module) -> bool:
    packages = [base.__module__.split(".") for base in type(getattr(module, "_orig_mod", module)).__mro__]
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


def intercept(instance: Any, **methods: Callable[..., Any]) -> None:
    """Give ``instance`` a subclass of its class in which ``methods`` come first; a second time does nothing."""
    cls = type(instance)
    if "_multicard_plain" in cls.__dict__:
        return
    wrapped = {name: functools.wraps(getattr(cls, name))(method) for name, method in methods.items()}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    instance.__class__ = type(cls.__name__, (cls,), {**names, **wrapped, "_multicard_plain": cls})


def plain_class(instance: Any) -> Any:
    """The class that ``instance`` had before it was intercepted."""
    cls = type(instance)
    return cls.__dict__.get("_multicard_plain", cls)


def _denoise(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return self._multicard_guide.denoise(self, args, kwargs)


def _step(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    self._multicard_guide.branches.end_step()
    return plain_class(self).step(self, *unwrap(args), **unwrap(kwargs))


def _run(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return self._multicard_guide.run(self, args, kwargs)
