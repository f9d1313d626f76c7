"""The denoisers of a pipeline: which components they are, and how guidance calls them."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from multicard.errors import UnsupportedError
from multicard.guidance import Part
from multicard.integrations.adapters import AdapterState
from multicard.integrations.diffusers.caches import Caches
from multicard.integrations.diffusers.state import ModuleState
from multicard.integrations.intercept import plain

NAMES = re.compile(r"transformer|unet|prior|denoiser|(^|_)dit($|_)|^decoder$")
NOT_DENOISERS = ("autoencoders", "controlnets", "adapter")  # packages of diffusers.models


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components of ``pipe`` that may run at each step, by role; never a text encoder or an autoencoder."""
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module) and not _is_beside(c)}
    found = {name: module for name, module in modules.items() if NAMES.search(name)} or modules
    if not found:
        raise UnsupportedError(f"{type(pipe).__name__} has no denoiser among {', '.join(pipe.components)}: use cfg=1")
    return found


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper; any other module itself."""
    wrapped = getattr(module, "_orig_mod", module)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def _is_beside(module: nn.Module) -> bool:
    packages = [base.__module__.split(".") for base in type(uncompiled(module)).__mro__]
    return any(p[0] == "transformers" or any(name in p for name in NOT_DENOISERS) for p in packages)


class HookedDenoiser:
    """A denoising module as :class:`~multicard.guidance.Denoiser`; its arguments by name."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        caches: Caches,
        around: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        """``around()`` is entered for each call."""
        self.name, self.module, self.caches, self._around = name, module, caches, around
        self.adapters = AdapterState(uncompiled(module))
        self._modules = list(uncompiled(module).modules())
        self._signature = inspect.signature(type(uncompiled(module)).forward)

    @property
    def keeps(self) -> bool:
        return self.caches.keep

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        bound = self._signature.bind(self.module, *args, **kwargs)
        named = dict(list(bound.arguments.items())[1:])
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(parameter.name, {}))
            elif parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
                raise UnsupportedError(f"{self.name} takes *{parameter.name}: pass its arguments by name")
        return named

    def run(self, kwargs: Mapping[str, Any], part: Part | None = None) -> Any:
        with self._around(), self.caches.during(part):
            return plain(self.module, "__call__")(**kwargs)

    def skip(self, part: Part) -> None:
        self.caches.skip(part)

    def state(self) -> object:
        return ModuleState(self._modules)

    def freeze(self, fresh: bool = False) -> Callable[[Mapping[str, Any]], Any]:
        """``run`` with the current hooks: those of diffusers and accelerate are in the instance's ``forward``."""
        hooked, caches = self._hooked(), self.caches.freeze(fresh)

        def run(kwargs: Mapping[str, Any]) -> Any:
            with _forwards(self._hooked(), hooked), caches():
                return self.run(kwargs)

        return run

    def _hooked(self) -> dict[nn.Module, Any]:
        return {module: module.__dict__["forward"] for module in self._modules if "forward" in module.__dict__}


@contextlib.contextmanager
def _forwards(now: Mapping[nn.Module, Any], then: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Put ``then`` in place of the forwards of ``now``, for a while."""
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
