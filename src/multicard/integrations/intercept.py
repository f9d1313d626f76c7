"""Intercepting a method of another library's class for chosen instances; other instances are unaffected.

So objects keep their class, which pipelines compare; a copy is intercepted like the original; and wrappers that are put
around ``forward`` later (offloading, hooks, compilation) stay inside. Code that removes hooks doesn't remove this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

DOOR, PLAIN = "_multicard_door", "_multicard_plain"

Plain = Callable[..., Any]


def intercept(instance: Any, name: str, door: Any, answer: str) -> None:
    """Make ``instance.name(...)`` call ``door.answer(instance, plain, args, kwargs)``; ``plain`` is the old method.

    Traced code calls the old method, after ``door.traced(instance)``.
    """
    instance.__dict__[DOOR] = door
    intercept_class(type(instance), name, answer)


def intercept_class(cls: type, name: str, answer: str) -> None:
    """The same for all instances of a class that have a door; instances without one aren't affected."""
    method = getattr(cls, name)
    if hasattr(method, PLAIN):
        return

    @functools.wraps(method)
    def intercepted(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        door = getattr(self, DOOR, None) if torch.compiler.is_compiling() else self.__dict__.get(DOOR)
        if door is None:
            return method(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            door.traced(self)
            return method(self, *args, **kwargs)
        return getattr(door, answer)(self, functools.partial(method, self), args, kwargs)

    setattr(intercepted, PLAIN, method)
    setattr(cls, name, intercepted)


def plain(instance: Any, name: str) -> Plain:
    """The method as it was before."""
    method = getattr(type(instance), name)
    return functools.partial(getattr(method, PLAIN, method), instance)
