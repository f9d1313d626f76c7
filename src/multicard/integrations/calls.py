"""A call's arguments by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@functools.cache
def parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, without ``self``, in order."""
    return tuple(inspect.signature(method).parameters)[1:]


def named(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All given arguments, by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def changed(
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    changes: Mapping[str, Callable[[Any], Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with each given one that ``changes`` names changed by its function, in that order."""
    given, others = list(args), dict(kwargs)
    for name, change in changes.items():
        if name in others:
            others[name] = change(others[name])
        elif name in names[: len(given)]:
            position = names.index(name)
            given[position] = change(given[position])
    return tuple(given), others
